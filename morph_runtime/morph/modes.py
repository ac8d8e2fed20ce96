"""What the controller's modes change: targets and caps, never the mechanism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from morph_runtime.engine.messages import Considered


@dataclass(frozen=True)
class ModeTargets:
    """What a mode changes.

    Attributes:
        bound: share of each SLO that a forecast may take and still count as meeting it.
        safe_bound: the same for the level that is gone to, deeper or milder, once one is gone to.
        goal_more: factor on the arrivals for which a deeper level must hold to be gone to: more than are seen, so that
            one step suffices while a burst still grows.
        safe_more: factor on the arrivals for which a milder level must hold to be gone back to.
        slack: share of the attainable gain that is given up for a milder level, where no level meets the SLOs.
        persist_s: seconds for which the present level must have been too mild before a down-shift.
        deepest: share of the levels that may be used.
        up_margin: share of a level's blocks that must stay free to go back up to it.
        wait_bound: without a cost model, the expected wait that is accepted, as a share of the TTFT target.
        capacity_persist_s: without a cost model, seconds for which KV must have been the bottleneck.
    """

    bound: float
    safe_bound: float
    goal_more: float
    safe_more: float
    slack: float
    persist_s: float
    deepest: float
    up_margin: float
    wait_bound: float
    capacity_persist_s: float


MODE_TARGETS: Mapping[str, ModeTargets] = {
    "accuracy": ModeTargets(1.0, 0.8, 1.1, 1.1, 0.3, 0.5, 0.5, 0.02, 1.0, 1.0),
    "balanced": ModeTargets(0.7, 0.5, 1.3, 1.15, 0.1, 0.0, 1.0, 0.05, 0.5, 0.3),
    "performance": ModeTargets(0.4, 0.25, 1.5, 1.3, 0.02, 0.0, 1.0, 0.15, 0.0, 0.1),
    "off": ModeTargets(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}


@dataclass(frozen=True)
class Choice:
    """What a rule has chosen.

    Attributes:
        target: the level to go to.
        reason: one word for the log and the counters.
        considered: what was forecast of the levels that mattered.
        met: whether some level that may be used is expected to meet the SLOs.
        held: the same as last time, with no new look at the load.
    """

    target: int
    reason: str
    considered: list[Considered] = field(default_factory=list)
    met: bool = True
    held: bool = False
