"""The rule without a cost model: it knows KV capacity and nothing of speed.

It acts only when KV blocks are what requests wait for; a queue for any other reason (all sequences taken, compute) is
not shortened by more of them.

Down: the expected wait at level k follows from Little's law: blocks are released at capacity / residence, so what
exceeds the capacity waits `excess / (capacity / residence)`. The smallest k that keeps it within the mode's bound is
the target. Up: the demand's peak over the dwell time must fit the lower level with a margin. Using the peak, not the
present value, is what keeps a load near the edge from flapping.
"""

from __future__ import annotations

from collections import deque

from morph_runtime.config import MorphSettings
from morph_runtime.morph.load import Load
from morph_runtime.morph.modes import Choice, ModeTargets


class CapacityRule:
    """Pure but for its memory: the same readings give the same choices."""

    pause_s = 0.0
    """Seconds for which it wants to see no other load."""

    def __init__(self, settings: MorphSettings) -> None:
        self._settings = settings
        self._bound_since: float | None = None
        self._last_down_s = float("-inf")
        self._peaks: deque[tuple[float, float]] = deque()
        self._preemptions = 0

    def choose(self, load: Load, mode: ModeTargets, deepest: int) -> Choice:
        """The level to go to; none deeper than `deepest`, and the present one is not."""
        self._remember(load)
        target, reason = self._down(load, mode, deepest) if self._kv_bound(load) else self._up(load, mode)
        if target > load.level:
            self._last_down_s = load.now_s
        return Choice(target, reason)

    def _kv_bound(self, load: Load) -> bool:
        """Whether requests wait for KV blocks, and for nothing else."""
        preempted = load.preemptions > self._preemptions
        self._preemptions = load.preemptions
        bound = (len(load.waiting) > 0 and not load.head_fits) or preempted
        if bound and len(load.running) < load.max_running:
            self._bound_since = load.now_s if self._bound_since is None else self._bound_since
        else:
            self._bound_since = None
        return self._bound_since is not None

    def _down(self, load: Load, mode: ModeTargets, deepest: int) -> tuple[int, str]:
        assert self._bound_since is not None
        if load.level >= deepest:
            return load.level, "deepest"
        if load.now_s - self._bound_since < mode.capacity_persist_s:
            return load.level, "persistence"
        bound = mode.wait_bound * self._settings.ttft_slo_s
        if expected_wait_s(load, load.level) <= bound and mode.wait_bound > 0:
            return load.level, "wait_within_target"
        for level in range(load.level + 1, deepest + 1):
            if expected_wait_s(load, level) <= bound:
                return level, "kv_wait"
        if load.capacities[deepest] <= load.capacities[load.level]:
            return load.level, "no_gain"
        return deepest, "kv_wait"

    def _up(self, load: Load, mode: ModeTargets) -> tuple[int, str]:
        if load.level == 0:
            return 0, "full_precision" if load.backlog == 0 else "not_kv_bound"
        since = min(load.now_s - self._last_down_s, load.now_s - self._peaks[0][0])
        if since < self._settings.dwell_s:
            return load.level, "dwell"
        peak = max(demand for _, demand in self._peaks)
        for level in range(load.level):
            if peak <= (1 - mode.up_margin) * load.capacities[level]:
                return level, "pressure_gone"
        return load.level, "demand"

    def _remember(self, load: Load) -> None:
        """Keep the demand of the last dwell time (one older reading shows that the window is full)."""
        self._peaks.append((load.now_s, load.demand))
        while len(self._peaks) > 1 and load.now_s - self._peaks[1][0] >= self._settings.dwell_s:
            self._peaks.popleft()


def expected_wait_s(load: Load, level: int) -> float:
    """Seconds that what exceeds the capacity of `level` is expected to wait for blocks (Little's law)."""
    capacity = int(load.capacities[level])
    excess = load.demand - capacity
    if excess <= 0:
        return 0.0
    return excess * load.typical.residence_s / max(capacity, 1)
