"""Requests in order of urgency."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from operator import attrgetter

from morph_runtime.scheduler.request import Request

_ORDER = attrgetter("order")


class Line:
    """A sorted list: adding and removing take a binary search, both ends are at hand."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Most urgent first; the line must not change meanwhile."""
        return iter(self._requests)

    @property
    def first(self) -> Request:
        """The most urgent request; the line is not empty."""
        return self._requests[0]

    @property
    def last(self) -> Request:
        """The least urgent request; the line is not empty."""
        return self._requests[-1]

    def add(self, request: Request) -> None:
        """Put a request into its place."""
        bisect.insort(self._requests, request, key=_ORDER)

    def remove(self, request: Request) -> None:
        """Take out a request that is in the line."""
        del self._requests[bisect.bisect_left(self._requests, request.order, key=_ORDER)]
