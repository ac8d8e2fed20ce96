"""A runner that does nothing before its result is asked for, as a GPU that is as slow as can be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from morph_runtime.engine.core import EngineParts
from morph_runtime.engine.runner import CpuRunner, Launched, StepRunner
from morph_runtime.kv import BlockPool
from morph_runtime.models.batch import HostBatch, check_batch, step_batch
from morph_runtime.models.decoder import Decoder
from morph_runtime.morph.swapper import LayerSwapper
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.sampler import Sampled, Sampler


@dataclass
class Frozen:
    """A sequence as it was at the launch."""

    tokens: list[int]
    prompt_len: int


class LateStep(Launched):
    """Runs at the first `result`, with what the launch was given and what memory holds by then."""

    def __init__(
        self, runner: LateRunner, batch: HostBatch, rows: Sequence[SamplingRow], previous: Launched | None
    ) -> None:
        self._runner = runner
        self._batch = batch
        self._previous = previous
        self._rows = [copy.copy(row) for row in rows]
        for row in self._rows:
            row.sequence = Frozen(list(row.sequence.tokens), row.sequence.prompt_len)
        self._sampled: Sampled | None = None
        self.expected: torch.Tensor | None = None

    @property
    def ready(self) -> bool:
        return self._sampled is not None

    def result(self) -> Sampled:
        if self._sampled is None:
            before = self._previous.result().tokens if self._previous is not None else ()
            self._previous = None
            self._runner.check_blocks(self._batch, before)
            logits = self.logits(before)
            if self.expected is not None:
                assert torch.equal(logits, self.expected), "what a step reads has changed while it was in flight"
            with torch.inference_mode():
                self._sampled = self._runner.sampler.sample(logits, self._rows) if self._rows else Sampled([])
        return self._sampled

    def logits(self, before: Sequence[int]) -> torch.Tensor:  # [rows, vocab] float32
        with torch.inference_mode():
            return self._runner.decoder.forward(step_batch(self._batch, before), self._runner.swapper.layers)

    def run_ahead(self) -> None:
        """Run the forward pass at the launch too: the same again later must give the same."""
        before = self._previous.result().tokens if self._previous is not None else ()
        self.expected = self.logits(before)


@dataclass
class LateRunner(StepRunner):
    """Steps run as late as can be; `twice`: also at their launch, to compare."""

    decoder: Decoder
    swapper: LayerSwapper
    sampler: Sampler
    pool: BlockPool
    block_tokens: int
    limits: tuple[int, int]
    twice: bool = False
    launches: int = 0
    overlapped: int = 0
    unresolved: list[LateStep] = field(default_factory=list)

    @staticmethod
    def of(parts: EngineParts, twice: bool = False) -> LateRunner:
        sampler = Sampler(parts.spec.eos_ids, torch.device("cpu"))
        limits = (parts.max_model_len, parts.spec.vocab)
        block_tokens = parts.config.memory.block_tokens
        assert isinstance(parts.runner, CpuRunner)
        return LateRunner(parts.runner.decoder, parts.swapper, sampler, parts.pool, block_tokens, limits, twice)

    def launch(self, batch: HostBatch, rows: Sequence[SamplingRow], previous: Launched | None) -> Launched:
        step = LateStep(self, batch, rows, previous)
        self.launches += 1
        self.unresolved = [other for other in self.unresolved if not other.ready]
        assert len(self.unresolved) <= 1, "one step in flight, and the one that is launched behind it"
        self.overlapped += len(self.unresolved)
        assert not any(row.needs_values and min(row.sequence.tokens) < 0 for row in rows), "a row lacks its values"
        self.unresolved.append(step)
        if self.twice:
            step.run_ahead()
        return step

    def check_blocks(self, batch: HostBatch, before: Sequence[int]) -> None:
        """A step may write into blocks alone that are live, have one holder, and that nobody can find."""
        check_batch(step_batch(batch, before), self.block_tokens, *self.limits, self.pool.capacity)
        for block in {int(slot) // self.block_tokens for slot in batch.slots}:
            assert self.pool.holders(block) == 1, f"block {block} is written though it has no holder, or others"
            assert not self.pool.is_kept(block), f"block {block} is written though others may find it"
        assert all(self.pool.holders(int(block)) for block in batch.blocks), "a block that is read was freed"
