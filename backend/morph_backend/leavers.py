"""Requests whose client has gone: their FINAL goes out a little later, when Triton expects nothing else of them.

Triton 2.51's gRPC front end may still have a write of the request in its completion queue when it learns of the
cancellation. If FINAL comes before that write has been taken out, the request's state is put into the queue a second
time, released at the first entry and used at the second: tritonserver segfaults in `ModelStreamInferHandler::Process`
(server#7368 and server#8034 describe the family). Many streams cancelled at once make the queue long. So FINAL waits;
the engine's work is stopped at once all the same, and no client waits for it.
"""

from __future__ import annotations

import threading
from collections import deque

from morph_backend.channel import ResponseChannel, Status

GRACE_S = 0.5
"""Seconds; far longer than Triton's completion queue takes for the events of some hundred streams."""


class Leavers:
    """Channels that take no response any more and have not sent FINAL. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[float, ResponseChannel]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, channel: ResponseChannel, now: float) -> None:
        """A channel that was abandoned `now`, in monotonic seconds."""
        with self._lock:
            self._waiting.append((now + GRACE_S, channel))

    def poll(self, now: float) -> None:
        """Send FINAL for those whose time has come, oldest first."""
        while (channel := self._due(now)) is not None:
            channel.bury(Status.CANCELLED, "Request was cancelled")

    def flush(self) -> None:
        """Send FINAL for all; the server ends."""
        self.poll(float("inf"))

    def _due(self, now: float) -> ResponseChannel | None:
        with self._lock:
            return self._waiting.popleft()[1] if self._waiting and self._waiting[0][0] <= now else None
