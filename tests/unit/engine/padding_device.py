"""A device that runs beside the host and pads its steps, with a clock of its own: what a GPU does to a cost model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from morph_runtime.costs import measure as measuring
from morph_runtime.costs import timing
from morph_runtime.engine.core import EngineParts
from morph_runtime.engine.runner import Launched, StepRunner
from morph_runtime.models.batch import HostBatch
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.sampler import Sampled

LINEAR = {"full": (5.0e-3, 20e-6), "w8": (3.4e-3, 11e-6), "w4": (2.7e-3, 24e-6)}
"""By rung: seconds that a step takes at least, and per token where computing bounds it; as of an 8B model."""
DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)


WALK_S = 5e-3


@contextmanager
def own_time() -> Iterator[None]:
    """Within, how long this machine takes for a walk or for the simulation changes nothing of what is measured."""

    def shift(parts: EngineParts, level: int) -> float:
        parts.shifter.target = level
        parts.shifter.settle()
        return WALK_S

    with patch.object(measuring, "_shift", shift), patch.object(timing, "PATIENCE", 1e6):
        yield


@dataclass
class Noise:
    """What disturbs steps."""

    rng: np.random.Generator
    jitter: float = 0.0
    """Standard deviation of a step's time, relative."""
    slow: float = 0.0
    """Share of the steps that take half as much again to twice as much."""
    late: float = 0.0
    """Share of the times at which the host sees the end of a step 5 ms late."""

    def factor(self) -> float:
        """On a step's time."""
        slow = 1.5 + 0.5 * self.rng.random() if self.rng.random() < self.slow else 1.0
        return slow * (1 + self.jitter * abs(self.rng.standard_normal()))

    def late_s(self) -> float:
        """Added by the host when it reads a result."""
        return 5e-3 if self.rng.random() < self.late else 0.0


class PaddingDevice(StepRunner):
    """Computes nothing; `now_s` is its clock, which stands still but for launches and waits."""

    def __init__(
        self, rungs: Callable[[], Sequence[str]], step_sizes: tuple[int, ...], mixed_sizes: tuple[int, ...],
        noise: Noise, launch_s: float = 5e-4,
    ) -> None:  # fmt: skip
        """`rungs`: those of the layers; `launch_s`: what a launch takes of the host."""
        self._rungs, self._noise, self._launch_s = rungs, noise, launch_s
        self._sizes, self._mixed_sizes = step_sizes, mixed_sizes
        self.now_s = self._free_s = 0.0
        self.launches = 0
        self.extra_s: Callable[[HostBatch], float] = lambda _: 0.0
        """Added to a step's time."""

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """See `StepRunner.step_sizes`."""
        return self._sizes

    @property
    def mixed_step_sizes(self) -> tuple[int, ...]:
        """See `StepRunner.mixed_step_sizes`."""
        return self._mixed_sizes

    def clock(self) -> float:
        """Seconds."""
        return self.now_s

    def launch(self, batch: HostBatch, rows: Sequence[SamplingRow], previous: Launched | None) -> Launched:
        """Put a step into the queue."""
        self.launches += 1
        self.now_s += self._launch_s
        self._free_s = max(self.now_s, self._free_s) + self.step_s(batch) * self._noise.factor() + self.extra_s(batch)
        return _Queued(self, self._free_s, len(rows))

    def step_s(self, batch: HostBatch) -> float:
        """What a step takes, undisturbed."""
        rungs = self._rungs()
        contexts = batch.contexts.astype(np.float64)
        decodes = batch.lengths == 1
        if batch.all_decodes:
            coarse = len(set(rungs)) > 1 or rungs[0] != "full"
            sizes = [n for n in DECODE_SIZES if not coarse or n & (n - 1) == 0]
            extra = 0.0
        else:
            sizes = list(self._sizes if len(set(rungs)) == 1 else self._mixed_sizes)
            lengths, ends = batch.lengths[~decodes].astype(np.float64), contexts[~decodes]
            pairs = float((lengths * (ends - lengths) + lengths * (lengths + 1) / 2).sum())
            extra = 3e-4 + pairs * 8e-10 + 1e-5 * decodes.sum() + 3e-8 * ends.sum()
        size = sizes[bisect_left(sizes, batch.num_tokens)]
        linear = [(base**4 + (size * each) ** 4) ** 0.25 for base, each in map(LINEAR.__getitem__, rungs)]
        # Reading is bound by memory, but for a few microseconds a layer however little there is to read.
        reads = float(np.hypot(1.5e-4, contexts[decodes].sum() * 3.3e-8)) if decodes.any() else 0.0
        return float(np.mean(linear)) + reads + extra


@dataclass(frozen=True)
class _Queued(Launched):
    device: PaddingDevice
    end_s: float
    rows: int

    @property
    def ready(self) -> bool:
        return self.device.now_s >= self.end_s

    def result(self) -> Sampled:
        self.device.now_s = max(self.device.now_s, self.end_s) + 1e-5 + self.device._noise.late_s()
        return Sampled([0] * self.rows)
