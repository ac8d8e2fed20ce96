"""The walk between levels, as the engine's shifter does it: layer by layer, capacity published last, lowered first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from morph_runtime.morph.costs import StepCosts


class Shifts:
    """Moves `level` towards `target`. `poll` is called between steps."""

    def __init__(self, costs: StepCosts, capacities: Sequence[int], depth: int, level: int = 0) -> None:
        self._costs = costs
        self._capacities = capacities
        self._depth = depth
        self._direction = 0
        self._room = level
        """The mildest level for which KV blocks have been given up, on the way up."""
        self.level = level
        self.target = level
        self.capacity = capacities[level]
        self.next_s = math.inf
        """When the layer that is changing has changed; infinity if none is."""
        self.changes: list[tuple[float, int]] = []
        """Each change of level: when, and to which."""
        self.down = 0
        self.up = 0
        self.refused = 0

    @property
    def busy(self) -> bool:
        """A layer is changing, or should."""
        return self._direction != 0 or self.target != self.level

    @property
    def begun(self) -> int:
        """The level once the layer that is changing has changed."""
        return self.level + self._direction

    def poll(self, now_s: float, used: int, running: int) -> None:
        """Book the layers that have changed by now and begin what can begin; `used` blocks are live, `running` requests
        may want another each.

        At one step boundary no more than `depth` layers change.
        """
        flips = 0
        while True:
            if self._direction:
                if self.next_s > now_s or flips == self._depth:
                    return
                self._flip(now_s)
                flips += 1
            if self.target == self.level:
                self._rest()
                return
            # The next layer begins when the one before it is done, which may be before this boundary.
            began_s = min(self.next_s, now_s)
            if self.target > self.level:
                self._direction = 1
                self._room = self.level
                self.next_s = began_s + self._costs.shift_s(self.level, self.level + 1)
            elif self._give_up_blocks(used + running):
                self._direction = -1
                self.next_s = began_s + self._costs.shift_s(self.level, self.level - 1)
            else:
                self.target = self.level
                self.refused += 1
                self._rest()
                return

    def _flip(self, now_s: float) -> None:
        self.level += self._direction
        self.changes.append((now_s, self.level))
        if self._direction > 0:
            self.down += 1
            self.capacity = self._capacities[self.level]
            self._room = self.level
        else:
            self.up += 1
        self._direction = 0

    def _rest(self) -> None:
        """Nothing is under way: what was given up for layers that will not go up is KV again."""
        self._direction = 0
        self.next_s = math.inf
        self._room = self.level
        self.capacity = self._capacities[self.level]

    def _give_up_blocks(self, needed: int) -> bool:
        """Lower the capacity for the next layers up: the whole bundle if that leaves what is needed, else one; False if
        neither does."""
        if self._room < self.level:
            return True
        for goal in (max(self.target, self.level - self._depth), self.level - 1):
            if needed <= self._capacities[goal]:
                self._room = goal
                self.capacity = min(self.capacity, self._capacities[goal])
                return True
        return False
