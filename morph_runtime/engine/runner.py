"""Running a step, whatever the device: the engine launches one and reads what it sampled later.

On a GPU `launch` puts the forward pass and the sampling into a queue and returns; the host schedules the
next step meanwhile. A decode of that next step may need a token which the host has not seen: its batch
says which row of the step before it is, and the runner puts it in, on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from morph_runtime.models.batch import HostBatch, step_batch
from morph_runtime.models.decoder import Decoder
from morph_runtime.morph.swapper import LayerSwapper
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.sampler import Sampled, Sampler


class Launched(ABC):
    """A step that runs, or has run."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether `result` returns without waiting."""

    @abstractmethod
    def result(self) -> Sampled:
        """What the step sampled, by row. Waits for it; the second call returns the same at once."""


class StepRunner(ABC):
    """Runs steps in the order of their launches. One thread at a time."""

    @abstractmethod
    def launch(self, batch: HostBatch, rows: Sequence[SamplingRow], previous: Launched | None) -> Launched:
        """Begin a step with the layers as they are now.

        All that the step needs of `rows` is read before this returns: requests go on growing. Of a row
        that `needs_values`, all tokens are known. Blocks of the batch stay as they are until `result`.

        Args:
            batch: the step; it must hold together.
            rows: the sequences whose next token is wanted, in the order of `batch.logits_at`.
            previous: the step launched before this one, to which the batch's unknown tokens refer; None only
                if there are no such tokens.
        """

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Sizes to which steps with prompt tokens are padded, ascending; empty: they are not padded."""
        return ()

    @property
    def mixed_step_sizes(self) -> tuple[int, ...]:
        """Those of `step_sizes` that serve where layers are at several rungs, the largest among them."""
        return self.step_sizes

    def close(self) -> None:  # noqa: B027  most have nothing to free
        """Free what running steps took; none runs any more."""


@dataclass(frozen=True)
class Done(Launched):
    """A step that had run when its launch returned."""

    sampled: Sampled

    @property
    def ready(self) -> bool:
        """Always."""
        return True

    def result(self) -> Sampled:
        """What was sampled."""
        return self.sampled


class CpuRunner(StepRunner):
    """Forward and sampling on the calling thread, before `launch` returns."""

    def __init__(self, decoder: Decoder, swapper: LayerSwapper, sampler: Sampler) -> None:
        """`swapper` knows the layers of the next step."""
        self.decoder = decoder
        self._swapper = swapper
        self._sampler = sampler

    def launch(self, batch: HostBatch, rows: Sequence[SamplingRow], previous: Launched | None) -> Launched:
        """As promised; the work is done here."""
        known = previous.result().tokens if previous is not None else ()
        with torch.inference_mode():
            logits = self.decoder.forward(step_batch(batch, known), self._swapper.layers)
            return Done(self._sampler.sample(logits, rows) if rows else Sampled([]))
