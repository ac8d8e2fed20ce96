"""Triton's queue and the engine's short line behind it: who is where at which time.

A request leaves the queue when it holds one of `line` credits, and is in the engine `handoff_s` later. The credit
comes back when a step has started the request. One request at a time is handed over, as `execute()` does.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque


class OuterQueue:
    """First come, first served. Times of `arrive` and `give_back` never fall."""

    def __init__(self, line: int, handoff_s: float) -> None:
        self._handoff_s = handoff_s
        self._credits: deque[float] = deque([-math.inf] * line)
        """When each free credit became free, or will."""
        self._arrivals: list[float] = []
        self._entries: list[float] = []
        """When each request that has got a credit enters the engine."""
        self.taken = 0
        """Requests that the engine has taken."""

    @property
    def next_entry_s(self) -> float:
        """When the next request enters the engine; infinity if none is known to."""
        return self._entries[self.taken] if self.taken < len(self._entries) else math.inf

    def arrive(self, at_s: float) -> None:
        """A request has come."""
        self._arrivals.append(at_s)
        self._grant()

    def take(self, now_s: float) -> range:
        """Those that have entered the engine by now and were not taken before, by number of arrival."""
        first = self.taken
        while self.taken < len(self._entries) and self._entries[self.taken] <= now_s:
            self.taken += 1
        return range(first, self.taken)

    def give_back(self, at_s: float) -> None:
        """A credit is free from `at_s` on."""
        self._credits.append(at_s)
        self._grant()

    def left_s(self, key: int) -> float:
        """When a request that has entered the engine, or will, left Triton's queue: `execute()` had taken it."""
        return max(self._arrivals[key], self._entries[key - 1] if key else -math.inf)

    def entered(self, at_s: float) -> int:
        """Requests that had entered the engine by a time."""
        return bisect_right(self._entries, at_s)

    def arrived(self, at_s: float) -> int:
        """Requests that had come by a time."""
        return bisect_right(self._arrivals, at_s)

    def pending(self, at_s: float) -> int:
        """Requests in Triton's queue at a time, which may lie in the past."""
        return self.arrived(at_s) - self.entered(at_s)

    def mean_wait_s(self, since_s: float, until_s: float) -> float:
        """Mean time in Triton's queue of those that have left it in (since, until]; 0 if none has."""
        left = range(self.entered(since_s), self.entered(until_s))
        return sum(self.left_s(key) - self._arrivals[key] for key in left) / len(left) if left else 0.0

    def blocked(self, now_s: float) -> int:
        """Requests that have come and wait for a credit now."""
        granted = len(self._entries)
        if granted == len(self._arrivals):
            return 0
        return max(0, bisect_right(self._arrivals, now_s, granted) - granted)

    def _grant(self) -> None:
        while self._credits and len(self._entries) < len(self._arrivals):
            free_s = max(self._arrivals[len(self._entries)], self._credits.popleft())
            last = self._entries[-1] if self._entries else -math.inf
            self._entries.append(max(free_s, last) + self._handoff_s)
