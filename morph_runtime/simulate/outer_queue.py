"""Triton's queue and the engine's short line behind it: who is where at which time.

A request leaves the queue when it gets its credit (`morph_runtime.credits`), and is in the engine `handoff_s` later.
One at a time is handed over, as `execute()` does: the next one asks when it has come, and the one before it is in.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

from morph_runtime.credits import CreditLimits, EngineNews, may_enter


class OuterQueue:
    """First come, first served. Times of `arrive` and `report` never fall, and nobody asks about times to come."""

    def __init__(self, limits: CreditLimits, handoff_s: float) -> None:
        self._limits = limits
        self._handoff_s = handoff_s
        self._arrivals: list[float] = []
        self._tokens: list[int] = []
        self._entries: list[float] = []
        """When each request that has got a credit enters the engine."""
        self._held: set[int] = set()
        self._held_tokens = 0
        self._reported_s = -math.inf
        self.news = EngineNews()
        """The engine's last report."""
        self.taken = 0
        """Requests that the engine has taken."""

    @property
    def next_entry_s(self) -> float:
        """When the next request enters the engine, if it reports nothing new before; infinity if none would."""
        if self.taken < len(self._entries):
            return self._entries[self.taken]
        return self._next_credit_s() + self._handoff_s

    def arrive(self, at_s: float, prompt_tokens: int) -> None:
        """A request has come, or will."""
        self._arrivals.append(at_s)
        self._tokens.append(prompt_tokens)

    def take(self, now_s: float) -> range:
        """Those that have entered the engine by now and were not taken before, by number of arrival."""
        self._settle(now_s)
        first = self.taken
        while self.taken < len(self._entries) and self._entries[self.taken] <= now_s:
            self.taken += 1
        return range(first, self.taken)

    def report(self, at_s: float, started: Iterable[int], news: EngineNews) -> None:
        """A step has told of itself: `started`, by number of arrival, give their credits back."""
        self._settle(at_s, before=True)
        for key in started:
            self._held.remove(key)
            self._held_tokens -= self._tokens[key]
        self._reported_s, self.news = at_s, news

    def left_s(self, key: int) -> float:
        """When a request that has entered the engine, or will, left Triton's queue: `execute()` had taken it."""
        return max(self._arrivals[key], self._entries[key - 1] if key else -math.inf)

    def entered(self, at_s: float) -> int:
        """Requests that had entered the engine by a time."""
        self._settle(at_s)
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
        self._settle(now_s)
        granted = len(self._entries)
        if granted == len(self._arrivals):
            return 0
        return max(0, bisect_right(self._arrivals, now_s, granted) - granted)

    def _next_credit_s(self) -> float:
        """When the next request gets its credit, if the engine reports nothing new before; infinity if none would."""
        key = len(self._entries)
        if key == len(self._arrivals):
            return math.inf
        if not may_enter(self._limits, self.news, len(self._held), self._held_tokens, 1, self._tokens[key]):
            return math.inf
        return max(self._arrivals[key], self._entries[-1] if self._entries else -math.inf, self._reported_s)

    def _settle(self, until_s: float, *, before: bool = False) -> None:
        """Give out the credits that are due by a time, or `before` it."""
        while (at_s := self._next_credit_s()) < until_s or (at_s == until_s and not before and at_s < math.inf):
            key = len(self._entries)
            self._held.add(key)
            self._held_tokens += self._tokens[key]
            self._entries.append(at_s + self._handoff_s)
