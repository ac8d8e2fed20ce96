"""Steps of dummy sequences, run and timed as the engine runs those of requests: its runner, its cache, real blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

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

    @property
    def steady(self) -> bool:
        """Whether the engine prepares a step while the one before runs, so that runs of steps are timed."""
        return self._parts.config.overlaps

    def run(self, shape: Shape, steps: int = 1) -> float:
        """Run steps to their end; seconds of one. The blocks are borrowed and the shape fits.

        With overlap, steps follow each other as in serving: one is launched while the one before runs. What counts is
        the time between the ends of two of them, or a launch where the host is the slower one; of either the median,
        for a step that is slow, or an end that is seen late, lengthens one interval and shortens another.

        Args:
            shape: of the steps.
            steps: that are timed, with overlap, after one that is not; without, one is.
        """
        batch = self._batch(shape)
        rows = [self._row] * len(batch.logits_at)
        launch, clock = self._parts.runner.launch, self.clock
        if not self.steady:
            began = clock()
            launch(batch, rows, None).result()
            return clock() - began
        flight, launches, ends = launch(batch, rows, None), [], []
        for _ in range(steps):
            began = clock()
            following = launch(batch, rows, flight)
            launches.append(clock() - began)
            flight.result()
            ends.append(clock())
            flight = following
        flight.result()
        ends.append(clock())
        return max(median(after - before for before, after in pairwise(ends)), median(launches))

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
