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
        self._clock = clock
        self._since: dict[int, float] = {}

    def begin(self) -> None:
        """This thread begins to send."""
        self._since[threading.get_ident()] = self._clock()

    def end(self) -> None:
        """Its send has returned, in whatever way."""
        self._since.pop(threading.get_ident(), None)

    def longest_s(self) -> float:
        """Seconds that the oldest send under way has taken; 0 without one."""
        since = list(self._since.values())  # one step of the interpreter: no other thread comes between
        return self._clock() - min(since) if since else 0.0


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

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            if self._times.longest_s() > self._limit_s:
                self._on_stuck(f"Triton has not taken a response for {self._limit_s:g} s; its front end hangs.")
                return
