"""What was computed for a request, where, and at which level: enough to compute it again and compare."""

from __future__ import annotations

from morph_runtime.scheduler import StepPlan

CACHED = -1
"""In place of a level: the keys and values came from the prefix cache."""

Run = tuple[int, int, int]
"""Positions [first, end) of prompt and output, and the level at which their keys and values were computed."""


class Histories:
    """The runs of those requests that ask for them; while none does, a step costs two tests.

    A run that begins at 0 says that the request began, or began anew after a preemption.
    """

    def __init__(self) -> None:
        self._untold: dict[int, list[Run]] = {}
        self._reached: dict[int, int] = {}

    @property
    def any_kept(self) -> bool:
        """Whether any request has asked."""
        return bool(self._untold)

    def begin(self, key: int) -> None:
        """Keep the history of a request, up to `end`."""
        self._untold[key] = []

    def ran(self, plan: StepPlan, level: int) -> None:
        """A step is launched."""
        if not self._untold:
            return
        for request in plan.preempted:
            self._reached.pop(request.key, None)
        for request, start, length, _ in plan.slices:
            if request.key in self._untold:
                self._add(request.key, start, start + length, level)

    def take(self, key: int) -> list[Run]:
        """The runs of a request since the last call; none if it keeps no history."""
        if runs := self._untold.get(key):
            self._untold[key] = []
            return runs
        return []

    def end(self, key: int) -> None:
        """A request has ended."""
        self._untold.pop(key, None)
        self._reached.pop(key, None)

    def _add(self, key: int, start: int, end: int, level: int) -> None:
        runs = self._untold[key]
        anew = key not in self._reached
        if anew and start:
            runs.append((0, start, CACHED))
        self._reached[key] = end
        if runs and not anew and runs[-1][1:] == (start, level):
            runs[-1] = (runs[-1][0], end, level)
        else:
            runs.append((start, end, level))
