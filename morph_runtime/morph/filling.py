"""Filling a slot in the background: who does it, and when the layer may be flipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.slots import LayerSlots


class Filling(ABC):
    """One slot that is being filled."""

    @abstractmethod
    def done(self) -> bool:
        """Whether a step may use the slot without waiting for it. Never waits."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until it is done (start-up, scripted schedules, tests)."""

    @abstractmethod
    def finish(self) -> None:
        """Put the steps that follow behind the filling; call once, when it is done.

        Raises:
            ConfigError, OSError: the bytes could not be had; the slot's content is undefined.
        """


class LayerFiller(ABC):
    """Fills slots, one after the other, while steps run."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Slots that it takes on at the same time."""

    @abstractmethod
    def start(
        self, target: LayerWeights, slot: Tensor, source: LayerWeights | None, wake: Callable[[], None]
    ) -> Filling:
        """Begin to fill a slot.

        Args:
            target: views of the slot: which layer, and at which rung.
            slot: uint8 [>= slot_bytes(rung)], the same memory.
            source: the same layer at full precision, or None; it stays as it is until the filling is done.
            wake: may be called from another thread when it is done.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for the background work to end."""


class ThreadFilling(Filling):
    """Filled by a thread of the process."""

    def __init__(self, job: Future[None]) -> None:
        self._job = job

    def done(self) -> bool:
        """See `Filling.done`."""
        return self._job.done()

    def wait(self) -> None:
        """See `Filling.wait`."""
        self._job.exception()

    def finish(self) -> None:
        """See `Filling.finish`."""
        self._job.result()


class ThreadFiller(LayerFiller):
    """Fills on the CPU with one thread, one slot at a time."""

    def __init__(self, slots: LayerSlots) -> None:
        self._slots = slots
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-fill")

    @property
    def depth(self) -> int:
        """One: a second would only take a core from the steps."""
        return 1

    def start(
        self, target: LayerWeights, slot: Tensor, source: LayerWeights | None, wake: Callable[[], None]
    ) -> Filling:
        """See `LayerFiller.start`."""
        job = self._worker.submit(self._slots.fill, target.layer, target.rung, slot, source)
        job.add_done_callback(lambda _: wake())
        return ThreadFilling(job)

    def close(self) -> None:
        """See `LayerFiller.close`."""
        self._worker.shutdown(wait=True)
