"""Steps of dummy sequences, run and timed as the engine runs those of requests: its runner, its cache, real blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from morph_runtime.engine.core import EngineParts
from morph_runtime.engine.environment import cpu_threads
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.models.batch import HostBatch
from morph_runtime.morph.costs import StepCosts, pairs_of
from morph_runtime.sampling.rows import SamplingRow

SEED = 0


@dataclass(frozen=True)
class Shape:
    """A step: `decodes` requests that read `context` tokens each, and one chunk of `prefill` tokens from `start` on."""

    decodes: int
    context: int = 0
    prefill: int = 0
    start: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.decodes + self.prefill

    @property
    def pairs(self) -> int:
        """Pairs of a prompt token and a token that it attends to."""
        return pairs_of(self.start, self.prefill)

    def predicted_s(self, costs: StepCosts, level: int) -> float:
        """What a model says."""
        return costs.seconds(level, self.decodes, self.decodes * self.context, self.prefill, self.pairs)

    def blocks(self, block_tokens: int) -> int:
        """KV blocks that it needs."""
        return self.decodes * -(-self.context // block_tokens) + -(-(self.start + self.prefill) // block_tokens)


@dataclass
class _Nobody:
    """A sequence of no request."""

    tokens: list[int] = field(default_factory=list)
    prompt_len: int = 0


class StepProbe:
    """Runs and times steps of an engine that serves nobody yet. The layers are as they are."""

    def __init__(self, parts: EngineParts, clock: Callable[[], float] | None = None) -> None:
        """`clock`: seconds; None: see `step_clock`."""
        self._parts = parts
        self.clock = clock or step_clock(parts)
        self._row = SamplingRow(SamplingParams(temperature=0.0), _Nobody())
        self._blocks: list[int] = []

    @property
    def parts(self) -> EngineParts:
        """The engine's."""
        return self._parts

    @contextmanager
    def borrow_blocks(self) -> Iterator[None]:
        """Hold all free KV blocks: the steps of `shape_fits` may run. They are free again afterwards."""
        pool = self._parts.pool
        self._blocks = pool.allocate(pool.num_free)
        try:
            yield
        finally:
            pool.free(self._blocks)
            self._blocks = []

    def shape_fits(self, shape: Shape, blocks: int) -> bool:
        """Whether an engine with so many KV blocks could run such a step."""
        settings = self._parts.config.scheduler
        longest = max(shape.context, shape.start + shape.prefill)
        return (
            shape.tokens <= settings.max_num_batched_tokens
            and shape.decodes + bool(shape.prefill) <= settings.max_num_seqs
            and longest <= self._parts.max_model_len
            and shape.blocks(self._parts.config.memory.block_tokens) <= blocks
        )

    def run(self, shape: Shape) -> float:
        """Run a step to its end; seconds. The blocks are borrowed and the shape fits."""
        batch = self._batch(shape)
        rows = [self._row] * len(batch.logits_at)
        began = self.clock()
        self._parts.runner.launch(batch, rows, None).result()
        return self.clock() - began

    def _batch(self, shape: Shape) -> HostBatch:
        """Sequences side by side in the borrowed blocks; token ids are random: embeddings come from all over."""
        size = self._parts.config.memory.block_tokens
        lengths = np.array([1] * shape.decodes + [shape.prefill] * bool(shape.prefill), dtype=np.int32)
        contexts = np.array([shape.context] * shape.decodes, dtype=np.int32)
        if shape.prefill:
            contexts = np.append(contexts, np.int32(shape.start + shape.prefill))
        counts = -(-contexts // np.int32(size))
        blocks = np.array(self._blocks[: counts.sum()], dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        positions = np.arange(shape.tokens) - np.repeat(ends - contexts, lengths)
        first_blocks = np.repeat(np.cumsum(counts) - counts, lengths)
        slots = blocks[first_blocks + positions // size] * np.int64(size) + positions % size
        ids = np.random.default_rng(SEED).integers(0, self._parts.spec.vocab, shape.tokens)
        return HostBatch(ids, positions, slots, lengths, contexts, blocks, counts, ends - 1)


def step_clock(parts: EngineParts) -> Callable[[], float]:
    """The clock for steps: where one thread does all of a step, its processor time, which other processes of a busy
    machine do not lengthen; else the time that passes.
    """
    alone = parts.config.device == "cpu" and cpu_threads(parts.config) == 1
    return time.thread_time if alone else time.perf_counter
