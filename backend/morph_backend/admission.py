"""Admission credits: which requests may wait in the engine while the rest waits in Triton's queue.

A credit is taken for each output of a request before it is handed to the engine, and comes back when the
engine first schedules that output (`morph_runtime.credits` has the rule). `execute()` blocks on it, which is what keeps
Triton's queue, and with it priorities, timeouts and the pending count, real.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from typing import Protocol

from morph_runtime.credits import CreditLimits, EngineNews, may_enter


class Admitted(Enum):
    """How waiting for a credit has ended."""

    YES = "yes"
    GAVE_UP = "gave up"
    CLOSED = "closed"


class Admitting(Protocol):
    """What the service takes: `Admission`, or a way to that of another process. Each method is described there."""

    @property
    def waiting(self) -> int: ...
    def set_limits(self, limits: CreditLimits) -> None: ...
    def acquire(
        self, keys: Collection[int], prompt_tokens: int, give_up: Callable[[], bool], poll_s: float = 0.05
    ) -> Admitted: ...
    def release(self, keys: Iterable[int]) -> None: ...
    def stepped(self, keys: Iterable[int], news: EngineNews) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


class Admission:
    """Gives out credits and takes them back. Safe to use from several threads."""

    def __init__(self, limits: CreditLimits) -> None:
        self._limits = limits
        self._news = EngineNews()
        self._holders: dict[int, int] = {}
        """Prompt tokens of each output that holds a credit."""
        self._changed = threading.Condition()
        self._closed = False
        self._queue: deque[object] = deque()  # of those who wait: the first to come enters first

    @property
    def waiting(self) -> int:
        """Requests that wait for a credit right now."""
        return len(self._queue)

    def set_limits(self, limits: CreditLimits) -> None:
        """The engine is known now."""
        with self._changed:
            self._limits = limits
            self._changed.notify_all()

    def acquire(
        self, keys: Collection[int], prompt_tokens: int, give_up: Callable[[], bool], poll_s: float = 0.05
    ) -> Admitted:
        """Wait for a credit for each of `keys`; who asks for more than there can be waits until nobody holds one.

        Args:
            keys: the outputs of one request.
            prompt_tokens: tokens of its prompt.
            give_up: asked at least every `poll_s` seconds and after each `wake`; True ends the wait.
            poll_s: seconds.
        """
        place = object()
        with self._changed:
            self._queue.append(place)
            try:
                while True:
                    if self._closed:
                        return Admitted.CLOSED
                    if give_up():
                        return Admitted.GAVE_UP
                    held, tokens = sum(self._holders.values()), prompt_tokens * len(keys)
                    if self._queue[0] is place and may_enter(
                        self._limits, self._news, len(self._holders), held, len(keys), tokens
                    ):
                        self._holders.update(dict.fromkeys(keys, prompt_tokens))
                        return Admitted.YES
                    self._changed.wait(poll_s)
            finally:
                self._queue.remove(place)
                self._changed.notify_all()  # the next one's turn

    def release(self, keys: Iterable[int]) -> None:
        """Give back the credits of `keys`; those that hold none are passed over."""
        with self._changed:
            self._give_back(keys)

    def stepped(self, keys: Iterable[int], news: EngineNews) -> None:
        """A step is over: what it has told, and whose credits it gives back."""
        with self._changed:
            self._news = news
            self._give_back(keys)

    def wake(self) -> None:
        """Make those who wait ask `give_up` now."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Give out no more credits; everyone who waits is told `CLOSED`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _give_back(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._holders.pop(key, None)
        if self._queue:
            self._changed.notify_all()
