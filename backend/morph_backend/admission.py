"""Admission credits: how many requests may wait in the engine before the rest waits in Triton's queue.

A credit is taken for each output of a request before it is handed to the engine, and comes back when the
engine first schedules that output. `execute()` blocks on it, which is what keeps Triton's queue, and
with it priorities, timeouts and the pending count, real.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from enum import Enum


class Admitted(Enum):
    """How waiting for a credit has ended."""

    YES = "yes"
    GAVE_UP = "gave up"
    CLOSED = "closed"


class Admission:
    """At most `line` outputs hold a credit at a time. Safe to use from several threads."""

    def __init__(self, line: int) -> None:
        self._line = line
        self._holders: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a credit right now."""
        return self._waiting

    def acquire(self, keys: Collection[int], give_up: Callable[[], bool], poll_s: float = 0.05) -> Admitted:
        """Wait for a credit for each of `keys`; who asks for more than the line has waits until nobody holds one.

        Args:
            keys: the outputs of one request.
            give_up: asked at least every `poll_s` seconds and after each `wake`; True ends the wait.
            poll_s: seconds.
        """
        with self._changed:
            self._waiting += 1
            try:
                while True:
                    if self._closed:
                        return Admitted.CLOSED
                    if give_up():
                        return Admitted.GAVE_UP
                    if not self._holders or len(self._holders) + len(keys) <= self._line:
                        self._holders.update(keys)
                        return Admitted.YES
                    self._changed.wait(poll_s)
            finally:
                self._waiting -= 1

    def release(self, key: int) -> None:
        """Give back the credit of `key`; nothing happens if it holds none."""
        with self._changed:
            if key in self._holders:
                self._holders.discard(key)
                self._changed.notify_all()

    def wake(self) -> None:
        """Make those who wait ask `give_up` now."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Give out no more credits; everyone who waits is told `CLOSED`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
