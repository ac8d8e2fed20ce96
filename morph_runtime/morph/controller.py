"""The controller: the least degradation that holds the TTFT target, and back up as soon as the load allows.

It acts only when KV capacity is what requests wait for; a queue for any other reason (all sequences
taken, compute) is not shortened by more KV blocks, so it holds (DESIGN: no step that does not help).

Down: the expected wait at level k follows from Little's law: blocks are released at
capacity / residence, so what exceeds the capacity waits `excess / (capacity / residence)`. The
smallest k that keeps it within the mode's bound is the target.
Up: the demand's peak over the dwell time must fit the lower level with a margin. Using the peak, not
the present value, is what keeps a load near the edge from flapping.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from dataclasses import dataclass

from morph_runtime.config import MorphSettings
from morph_runtime.engine.messages import Decision
from morph_runtime.morph.signals import Signals


@dataclass(frozen=True)
class ModeTargets:
    """What a mode changes.

    Attributes:
        wait_bound: expected wait that is still accepted, as a share of the TTFT target.
        persist_s: seconds for which KV must have been the bottleneck before a down-shift.
        deepest: share of the levels that may be used.
        up_margin: share of a level's blocks that must stay free to go back up to it.
    """

    wait_bound: float
    persist_s: float
    deepest: float
    up_margin: float


MODE_TARGETS = {
    "accuracy": ModeTargets(wait_bound=1.0, persist_s=1.0, deepest=0.5, up_margin=0.02),
    "balanced": ModeTargets(wait_bound=0.5, persist_s=0.3, deepest=1.0, up_margin=0.05),
    "performance": ModeTargets(wait_bound=0.0, persist_s=0.1, deepest=1.0, up_margin=0.15),
    "off": ModeTargets(wait_bound=0.0, persist_s=0.0, deepest=0.0, up_margin=0.0),
}


class Controller:
    """Turns signals into a target level. Pure but for its memory: the same readings give the same decisions."""

    def __init__(self, settings: MorphSettings, max_level: int) -> None:
        self._settings = settings
        self._max_level = max_level
        self._mode = settings.mode
        self._bound_since: float | None = None
        self._last_down_s = float("-inf")
        self._peaks: deque[tuple[float, float]] = deque()
        self._preemptions = 0
        self._fresh: list[Decision] = []
        self._last_hold = ""
        self.counts: dict[str, int] = {}

    @property
    def mode(self) -> str:
        """The mode in force."""
        return self._mode

    def set_mode(self, mode: str) -> None:
        """Change the mode. Raises KeyError for an unknown one."""
        MODE_TARGETS[mode]
        self._mode = mode

    def decide(self, signals: Signals) -> int:
        """The level to go to; the decision and its reason are logged and counted."""
        self._remember(signals)
        target, reason = self._choose(signals)
        action = "hold" if target == signals.level else ("down" if target > signals.level else "up")
        if action == "down":
            self._last_down_s = signals.now_s
        self._record(signals, action, reason, target)
        return target

    def take_decisions(self) -> list[Decision]:
        """Decisions other than repeated holds since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def _choose(self, signals: Signals) -> tuple[int, str]:
        mode = MODE_TARGETS[self._mode]
        deepest = round(mode.deepest * self._max_level)
        if signals.level > deepest:
            return deepest, "mode"
        if self._kv_bound(signals):
            return self._down(signals, mode, deepest)
        return self._up(signals, mode)

    def _kv_bound(self, signals: Signals) -> bool:
        """Whether requests wait for KV blocks, and for nothing else."""
        preempted = signals.preemptions > self._preemptions
        self._preemptions = signals.preemptions
        bound = (signals.waiting > 0 and not signals.head_fits) or preempted
        if bound and signals.running < signals.max_running:
            self._bound_since = signals.now_s if self._bound_since is None else self._bound_since
        else:
            self._bound_since = None
        return self._bound_since is not None

    def _down(self, signals: Signals, mode: ModeTargets, deepest: int) -> tuple[int, str]:
        assert self._bound_since is not None
        if signals.level >= deepest:
            return signals.level, "deepest"
        if signals.now_s - self._bound_since < mode.persist_s:
            return signals.level, "persistence"
        bound = mode.wait_bound * self._settings.ttft_slo_s
        if expected_wait_s(signals, signals.level) <= bound and mode.wait_bound > 0:
            return signals.level, "wait_within_target"
        for level in range(signals.level + 1, deepest + 1):
            if expected_wait_s(signals, level) <= bound:
                return level, "kv_wait"
        if signals.capacities[deepest] <= signals.capacities[signals.level]:
            return signals.level, "no_gain"
        return deepest, "kv_wait"

    def _up(self, signals: Signals, mode: ModeTargets) -> tuple[int, str]:
        if signals.level == 0:
            return 0, "full_precision" if signals.backlog == 0 else "not_kv_bound"
        since = min(signals.now_s - self._last_down_s, signals.now_s - self._peaks[0][0])
        if since < self._settings.dwell_s:
            return signals.level, "dwell"
        peak = max(demand for _, demand in self._peaks)
        for level in range(signals.level):
            if peak <= (1 - mode.up_margin) * signals.capacities[level]:
                return level, "pressure_gone"
        return signals.level, "demand"

    def _remember(self, signals: Signals) -> None:
        """Keep the demand of the last dwell time (one older reading shows that the window is full)."""
        self._peaks.append((signals.now_s, signals.demand))
        while len(self._peaks) > 1 and signals.now_s - self._peaks[1][0] >= self._settings.dwell_s:
            self._peaks.popleft()

    def _record(self, signals: Signals, action: str, reason: str, target: int) -> None:
        key = f"{action}/{reason}"
        self.counts[key] = self.counts.get(key, 0) + 1
        if action == "hold" and reason == self._last_hold:
            return
        self._last_hold = reason if action == "hold" else ""
        decision = Decision(
            at_s=signals.now_s, action=action, reason=reason, level_from=signals.level, level_to=target,
            inputs=signals.as_inputs(),
        )  # fmt: skip
        self._fresh.append(decision)
        level = logging.DEBUG if action == "hold" else logging.INFO
        logging.getLogger(__name__).log(
            level, "%s %d -> %d (%s) %s", action, signals.level, target, reason, json.dumps(decision.inputs)
        )


def expected_wait_s(signals: Signals, level: int) -> float:
    """Seconds that what exceeds the capacity of `level` is expected to wait for blocks (Little's law)."""
    capacity = signals.capacities[level]
    excess = signals.demand - capacity
    if excess <= 0:
        return 0.0
    return excess * signals.residence_s / max(capacity, 1)
