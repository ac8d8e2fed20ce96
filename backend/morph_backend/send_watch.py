"""Notices when Triton takes no response any more.

Triton 2.51's gRPC front end can lock up: a stream that is cancelled just as it ends makes two of its threads wait for
each other's lock for ever (`ModelStreamInferHandler::StreamInferResponseComplete` and `Context::IsCancelled`). The
send that met it never returns, and neither do those behind it; streams would hang, with every health check green.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from morph_backend.worker import Worker


class SendTimes:
    """When each thread's send began. Safe to use from several threads; a thread has one send at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._since: dict[int, float] = {}

    def begin(self) -> None:
        """This thread begins to send."""
        self._since[threading.get_ident()] = self.clock()

    def end(self) -> None:
        """Its send has returned, in whatever way."""
        self._since.pop(threading.get_ident(), None)

    def under_way(self) -> list[tuple[int, float]]:
        """The sends that have not returned: thread, and when it began."""
        return list(self._since.items())  # one step of the interpreter: no other thread comes between


class SendWatch(Worker):
    """Looks once a second; a thread of its own, for any other might have a response to send."""

    def __init__(
        self,
        times: SendTimes,
        limit_s: float,
        on_stuck: Callable[[str], None],
        on_defect: Callable[[str], None] = lambda _thread: None,
        interval_s: float = 1.0,
    ) -> None:
        """`on_stuck` is told once, with a sentence, when a send takes longer than `limit_s` seconds."""
        super().__init__("send-watch", interval_s, on_defect)
        self._times, self._limit_s, self._on_stuck = times, limit_s, on_stuck
        self._looked_s = times.clock()
        self._taken_s: dict[tuple[int, float], float] = {}

    def longest_s(self) -> float:
        """One look: seconds that the oldest send under way has taken while this process ran; 0 without one."""
        now = self._times.clock()
        # Of a long pause only a part counts: it was this process that stood still.
        elapsed_s, self._looked_s = min(now - self._looked_s, 2 * self._interval_s), now
        self._taken_s = {
            send: self._taken_s.get(send, 0.0) + min(elapsed_s, now - send[1]) for send in self._times.under_way()
        }
        return max(self._taken_s.values(), default=0.0)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            if self.longest_s() > self._limit_s:
                self._on_stuck(f"Triton has not taken a response for {self._limit_s:g} s; its front end hangs.")
                return
