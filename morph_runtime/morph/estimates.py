"""Estimates for what cannot be seen: lengths of requests in the outer queue, the age of its oldest, arrival rates."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque

import numpy as np

from morph_runtime.engine.messages import QueueSignal
from morph_runtime.morph.load import Floats, Ints, Outer

KEPT = 256
"""Ended requests whose lengths are remembered."""
UNKNOWN = 200
"""Tokens that a request is taken to generate, unless it may not, before any has ended."""
FAST_S, SLOW_S = 1.5, 20.0
"""Time constants of the two arrival rates."""
HISTORY = 1024
"""Readings of the outer queue that are remembered."""


class Mean:
    """An exponential mean whose first value counts whole."""

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self.seen = False
        self.value = 0.0

    def add(self, value: float) -> None:
        """Take a value in."""
        self.value += (self._weight if self.seen else 1.0) * (value - self.value)
        self.seen = True


class OutputLengths:
    """How many tokens a request generates yet, given how many it has: from the lengths of those that have ended."""

    def __init__(self) -> None:
        self._ended: deque[int] = deque(maxlen=KEPT)
        self._sorted: Ints | None = None
        self._rest: Floats = np.zeros(1)

    @property
    def known(self) -> bool:
        """Whether any has ended."""
        return bool(self._ended)

    def add(self, output: int) -> None:
        """A request has ended after so many tokens."""
        self._ended.append(output)
        self._sorted = None

    def left(self, output: Ints, most: Ints) -> Floats:
        """Tokens expected yet: the mean over ended requests that were longer, at least 1, never above `most`.

        Args:
            output: int64 [N], tokens so far.
            most: int64 [N], tokens that it may have yet.

        Returns:
            float64 [N]; while nothing has ended, `most` up to `UNKNOWN`.
        """
        if not self._ended:
            return np.minimum(most, UNKNOWN).astype(np.float64)
        if self._sorted is None:
            self._sorted = np.sort(np.fromiter(self._ended, np.int64, len(self._ended)))
            counts = np.arange(len(self._sorted), 0, -1)
            self._rest = np.append(np.cumsum(self._sorted[::-1])[::-1] / counts, 0.0)
        longer = np.searchsorted(self._sorted, output, side="right")
        # Longer than any that is known: nothing says when it ends, and long ones tend to go on.
        likely = np.where(longer < len(self._sorted), self._rest[longer] - output, output / 4)
        result: Floats = np.minimum(np.maximum(likely, 1.0), np.maximum(most, 1))
        return result


class Rate:
    """Requests per second, over a few seconds and over many."""

    def __init__(self) -> None:
        self._fast = self._slow = 0.0
        self._at_s: float | None = None

    def add(self, count: float, now_s: float) -> None:
        """`count` requests have come since the last call."""
        if self._at_s is None:
            self._at_s = now_s
            return
        seconds, self._at_s = now_s - self._at_s, now_s
        if seconds <= 0:
            return
        rate = count / seconds
        self._fast += (rate - self._fast) * (1 - math.exp(-seconds / FAST_S))
        # From 0 on, as the fast one: a burst in the first seconds is a burst and not the mean.
        self._slow += (rate - self._slow) * (1 - math.exp(-seconds / SLOW_S))

    @property
    def fast(self) -> float:
        """Over about `FAST_S` seconds."""
        return self._fast

    @property
    def slow(self) -> float:
        """Over about `SLOW_S` seconds."""
        return self._slow


class OuterQueue:
    """Follows the outer queue's signal: arrivals, and how long its oldest request has been in it."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=HISTORY)
        self._arrived: deque[float] = deque(maxlen=HISTORY)
        self._pending = 0
        self.rate = Rate()
        self.age_error = Mean()
        """Seconds by which the estimated age of the oldest differed from what those that left had waited."""

    def take(self, signal: QueueSignal) -> None:
        """A new reading; an older one or the same one again changes nothing."""
        if self._times and signal.taken_s <= self._times[-1]:
            return
        if signal.queue_time_s > 0 and self._pending:
            self.age_error.add(abs(self._oldest_s(signal.taken_s) - signal.queue_time_s))
        seconds = signal.taken_s - self._times[-1] if self._times else 0.0
        came = signal.arrivals_per_s * seconds if self._times else float(signal.pending)
        before = self._arrived[-1] if self._arrived else 0.0
        self._times.append(signal.taken_s)
        self._arrived.append(before + came)
        self._pending = signal.pending
        self.rate.add(came, signal.taken_s)

    def state(self, now_s: float) -> Outer:
        """What is known of it now."""
        return Outer(self._pending, self._oldest_s(now_s))

    def _oldest_s(self, now_s: float) -> float:
        """The queue is taken to be first in, first out: its oldest came when all but the pending ones had come."""
        if not self._pending:
            return 0.0
        gone = self._arrived[-1] - self._pending
        place = bisect_right(self._arrived, gone + 0.5)
        return max(0.0, now_s - self._times[min(place, len(self._times) - 1)])
