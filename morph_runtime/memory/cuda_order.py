"""Fences of a CUDA stream: events."""

from __future__ import annotations

import torch

from morph_runtime.memory.fence import DeviceOrder, Fence


class EventFence(Fence):
    """A recorded event."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def done(self) -> bool:
        """See `Fence.done`."""
        return bool(self._event.query())

    def wait(self) -> None:
        """See `Fence.wait`."""
        self._event.synchronize()


class StreamOrder(DeviceOrder):
    """The stream on which steps run."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    @property
    def queues(self) -> bool:
        """A stream is one."""
        return True

    def fence(self) -> Fence:
        """Behind all that the stream has been given."""
        event = torch.cuda.Event()
        event.record(self.stream)
        return EventFence(event)
