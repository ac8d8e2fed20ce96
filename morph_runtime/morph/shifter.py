"""The shifter walks from the present level to the target, layer by layer, at step boundaries.

As many changes are under way at the same time as the filler takes on and free extents allow. On the
way down free KV blocks are lent for that, and the pages that a layer gives up serve as room for the next changes
first and become KV blocks when they are no longer needed, so a walk of many layers gains speed as it goes.

Where the arena has a worker, a layer flips no sooner than one step boundary after its memory was ordered. What is freed
can be ordered anew at once, as the worker keeps to the order.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from morph_runtime.errors import ConfigError
from morph_runtime.kv import CannotShrink
from morph_runtime.memory.arena import ArenaExhausted
from morph_runtime.memory.fence import DeviceOrder
from morph_runtime.morph.levels import LevelPlan, Transition
from morph_runtime.morph.resizer import KVResizer
from morph_runtime.morph.swapper import LayerSwapper

FIRST_HOLD_S, LONGEST_HOLD_S = 1.0, 60.0
"""Pause after a shift that failed (a checkpoint that cannot be read, no memory mapping); doubles each time."""


COPIES_AHEAD = 3
"""Layers that are on their way up at the same time: enough to keep the bus busy, and no more, as whatever else is
copied to the device waits for them."""


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
        capacities: Sequence[int],
        order: DeviceOrder,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`capacities`: KV blocks at each level, as the ledger gives them."""
        self._plan = plan
        self._swapper = swapper
        self._resizer = resizer
        self._capacities = capacities
        self._order = order
        self._clock = clock
        self._before_change: Callable[[], None] = lambda: None
        self._direction = 0
        self._begun = 0
        """The level once all changes under way have flipped."""
        self._room = 0
        """The mildest level for which KV blocks have been given up, on the way up."""
        self._began_s: deque[float] = deque()
        self._has_spare = False
        """Pages have come back that may become KV blocks."""
        self._refused_at = -1
        """The level from which no way up was found, and said so; -1: none since the last that was found."""
        self._hold_s = 0.0
        self._hold_until_s = 0.0
        self.level = 0
        self.target = 0
        self.counters = ShiftCounters()

    def before_change(self, callback: Callable[[], None]) -> None:
        """Have `callback` called before KV blocks move and, unless the device puts a change behind the step that runs,
        before a layer flips. It returns when no step runs.
        """
        self._before_change = callback

    @property
    def busy(self) -> bool:
        """A layer is changing, or pages are on their way."""
        return not (self._swapper.is_settled and self._resizer.is_settled)

    @property
    def begun(self) -> int:
        """The level once all changes under way have flipped."""
        return self._begun

    def poll(self) -> bool:
        """Flip layers whose bytes are ready, move pages that nothing reads, begin what can begin; True if the level
        has changed."""
        before = self.level
        self._resizer.check()
        self._publish()
        self._swapper.fill()
        self._flip()
        if self._begun != self.target:
            self._advance()
        while self._release():
            pass
        self._flip()  # a filling that steps can simply be put behind is ready at once
        if self._has_spare or self._room < self._begun or (self._resizer.has_lent and self._begun == self.target):
            self._regrow()
        return self.level != before

    def settle(self) -> None:
        """Block until the target is reached (start-up, tests, scripted schedules)."""
        self._hold_until_s = 0.0
        while True:
            self.poll()
            if self.level == self.target and not self.busy:
                self._regrow()
                self._publish(wait=True)
                return
            self._swapper.wait()
            while self._release(wait=True):
                pass
            self._publish(wait=True)
            self._resizer.finish(wait=True)
            self._resizer.check(wait=not self._swapper.num_pending)

    def _advance(self) -> None:
        """Begin changes towards the target."""
        direction = (self.target > self._begun) - (self.target < self._begun)
        if self._swapper.num_pending and direction != self._direction:
            return  # what is under way comes first
        if direction and self._clock() < self._hold_until_s:
            self.target = self._begun
            return
        self._direction = direction
        if direction < 0 and not self._make_room():
            return
        has_resized = self._resizer.finish()
        self._begin(direction)
        if direction > 0 and has_resized:
            free = self._resizer.free_extents
            self._resizer.lend(self._extents_ahead(self._begun, self._swapper.depth - self._swapper.num_pending) - free)

    def _begin(self, direction: int) -> None:
        """Begin as many changes as there is room for."""
        while self._begun != self.target and (direction > 0 or self._swapper.num_pending < COPIES_AHEAD):
            change = self._plan.transition(self._begun, direction)
            if (direction < 0 and self._begun == self._room) or not self._can_begin(change):
                return
            began = self._clock()
            try:
                self._swapper.begin(change)
            except (ArenaExhausted, OSError) as reason:
                self._give_up(reason)
                return
            self._began_s.append(began)
            self._begun += direction

    def _can_begin(self, change: Transition) -> bool:
        """Whether there is room for a change. Pages are given back one layer at a time for that: a mapping is ordered
        behind no more of it than it needs.
        """
        while not self._swapper.can_begin(change):
            if not self._release():
                return False
        return True

    def _release(self, wait: bool = False) -> bool:
        """Give back the pages of one layer that no step reads any more, if there is one."""
        released = self._swapper.release(wait)
        self._has_spare = self._has_spare or released
        return released

    def _publish(self, wait: bool = False) -> None:
        """Raise the KV capacity if its memory has come; if the system refused that, pages stay spare."""
        try:
            self._resizer.publish(wait)
        except OSError as reason:
            self._log_no_growth(reason)

    def _extents_ahead(self, level: int, count: int) -> int:
        """Extents that the next changes on the way down need, `count` of them at most, from `level` on."""
        ahead = range(level, min(self.target, level + count))
        return sum(self._swapper.extents_for(self._plan.transition(at, 1)) for at in ahead)

    def _make_room(self) -> bool:
        """Give up the KV blocks that the next changes on the way up displace; True once their pages are free."""
        if not self._resizer.finish():
            return False
        if self._room >= self._begun:
            # The whole bundle at once if live KV allows, else one layer.
            for goal in (max(self.target, self._begun - self._swapper.depth), self._begun - 1):
                try:
                    self._resizer.lower(self._capacities[goal], self._before_change)
                except CannotShrink as reason:
                    refusal = reason
                    continue
                self._room = goal
                self._refused_at = -1
                break
            else:
                # Live KV came back since the decision, or somebody wants the level whatever the load: stay, the
                # controller will ask again, and may go on asking with every decision.
                if self._begun != self._refused_at:
                    self._refused_at = self._begun
                    logging.getLogger(__name__).info("up-shift refused at level %d for now: %s", self._begun, refusal)
                self.target = self._begun
                self.counters.refused += 1
                return False
        return self._resizer.finish()

    def _flip(self) -> None:
        """Flip every layer that is filled, in the order in which they began."""
        while self._swapper.is_ready:
            if not self._order.queues:
                self._before_change()
            try:
                change = self._swapper.commit(self._order.fence)
            except (ConfigError, OSError) as reason:
                self._give_up(reason)
                return
            self._hold_s = 0.0
            self.level += self._direction
            seconds = self._clock() - self._began_s.popleft()
            counters = self.counters
            counters.by_rung[change.target] = counters.by_rung.get(change.target, 0) + 1
            if change.is_down:
                counters.down += 1
                counters.down_seconds += seconds
            else:
                counters.up += 1
                counters.up_seconds += seconds

    def _give_up(self, reason: Exception) -> None:
        """A shift has failed: the layers serve on as they are, the pages become KV again, and the next try waits."""
        self._hold_s = min(max(FIRST_HOLD_S, 2 * self._hold_s), LONGEST_HOLD_S)
        self._hold_until_s = self._clock() + self._hold_s
        logging.getLogger(__name__).error(
            "a layer could not change its precision, next try in %g s: %s", self._hold_s, reason
        )
        if not self._swapper.num_pending:
            self._began_s.clear()
            self._begun = self.level
        self.target = self._begun
        self.counters.refused += 1
        self._regrow()

    def _regrow(self) -> None:
        """Turn spare pages into KV blocks; if the system refuses, they stay spare until the next change."""
        if self._direction < 0 and (self._swapper.num_pending or self._begun != self.target):
            return  # the pages are for the layers that go up
        if not self._resizer.finish():
            return
        keep = 0
        if self.target > self._begun:
            keep = self._extents_ahead(self._begun + 1, self._swapper.depth - 1)
        try:
            self._resizer.grow(self._capacities[self._begun], keep)
        except OSError as reason:
            self._log_no_growth(reason)
        self._room = self._begun
        self._has_spare = False

    def _log_no_growth(self, reason: OSError) -> None:
        logging.getLogger(__name__).error("the KV cache could not grow: %s", reason)
