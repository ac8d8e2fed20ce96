"""The shifter walks from the present level to the target, one layer at a time, at step boundaries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from morph_runtime.errors import ConfigError
from morph_runtime.kv import CannotShrink
from morph_runtime.morph.levels import LevelPlan
from morph_runtime.morph.resizer import KVResizer
from morph_runtime.morph.swapper import LayerSwapper

FIRST_HOLD_S, LONGEST_HOLD_S = 1.0, 60.0
"""Pause after a shift that failed (a checkpoint that cannot be read, no memory mapping); doubles each time."""


@dataclass
class ShiftCounters:
    """Totals since start: finished shifts, their seconds, and by the rung that was reached."""

    down: int = 0
    up: int = 0
    down_seconds: float = 0.0
    up_seconds: float = 0.0
    by_rung: dict[str, int] = field(default_factory=dict)
    refused: int = 0


class LevelShifter:
    """Moves `level` towards `target`. `poll` is called between steps and never waits."""

    def __init__(
        self,
        plan: LevelPlan,
        swapper: LayerSwapper,
        resizer: KVResizer,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wake` is called from another thread when a background fill is done, so that an idle loop polls again."""
        self._plan = plan
        self._swapper = swapper
        self._resizer = resizer
        self._wake = wake
        self._clock = clock
        self._before_change: Callable[[], None] = lambda: None
        self._job: Future[None] | None = None
        self._direction = 0
        self._began_s = 0.0
        self._hold_s = 0.0
        self._hold_until_s = 0.0
        self.level = 0
        self.target = 0
        self.counters = ShiftCounters()

    def before_change(self, callback: Callable[[], None]) -> None:
        """Have `callback` called before KV blocks move or pages that a step may read are given away.

        It returns when no step runs.
        """
        self._before_change = callback

    @property
    def busy(self) -> bool:
        """A layer is changing."""
        return self._job is not None

    def poll(self) -> bool:
        """Finish a shift whose bytes are ready and begin the next one; True if the level has changed."""
        changed = self._job is not None and self._job.done()
        if changed:
            self._commit()
        if self._job is None and self.level != self.target:
            if self._clock() < self._hold_until_s:
                self.target = self.level
            else:
                self._begin()
        return changed

    def settle(self) -> None:
        """Block until the target is reached (start-up, tests, scripted schedules)."""
        self._hold_until_s = 0.0
        while self.level != self.target or self._job is not None:
            self.poll()
            if self._job is not None:
                self._job.exception()

    def _begin(self) -> None:
        self._direction = 1 if self.target > self.level else -1
        change = self._plan.transition(self.level, self._direction)
        self._began_s = self._clock()
        if not change.is_down:
            self._before_change()
            try:
                extents = self._swapper.slot_extents
                self._resizer.make_room(extents(change.target), extents(change.source))
            except CannotShrink as reason:
                # Live KV came back since the decision: stay, the controller will ask again.
                logging.getLogger(__name__).info("up-shift refused: %s", reason)
                self.target = self.level
                self.counters.refused += 1
                return
        try:
            self._job = self._swapper.begin(change)
        except OSError as reason:
            self._give_up(reason)
            return
        self._job.add_done_callback(lambda _: self._wake())

    def _give_up(self, reason: Exception) -> None:
        """A shift has failed: the layer serves on as it is, the pages become KV again, and the next try waits."""
        self._hold_s = min(max(FIRST_HOLD_S, 2 * self._hold_s), LONGEST_HOLD_S)
        self._hold_until_s = self._clock() + self._hold_s
        logging.getLogger(__name__).error(
            "a layer could not change its precision, next try in %g s: %s", self._hold_s, reason
        )
        self.target = self.level
        self.counters.refused += 1
        self._regrow()

    def _regrow(self) -> None:
        """Turn spare pages into KV blocks; if the system refuses, they stay spare until the next change."""
        try:
            self._resizer.grow()
        except OSError as reason:
            logging.getLogger(__name__).error("the KV cache could not grow: %s", reason)

    def _commit(self) -> None:
        self._job = None
        self._before_change()
        try:
            change = self._swapper.commit()
        except (ConfigError, OSError) as reason:
            self._give_up(reason)
            return
        self._hold_s = 0.0
        self.level += self._direction
        # Also after an up-shift: what rounding to quanta freed too much goes back to the KV cache.
        self._regrow()
        seconds = self._clock() - self._began_s
        counters = self.counters
        counters.by_rung[change.target] = counters.by_rung.get(change.target, 0) + 1
        if change.is_down:
            counters.down += 1
            counters.down_seconds += seconds
        else:
            counters.up += 1
            counters.up_seconds += seconds
