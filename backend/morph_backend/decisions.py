"""The controller's changes of level as lines for the operator."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone

from morph_runtime.engine.messages import Considered, Decision

LOGGER = "morph.decisions"
SHOWN_INPUTS = ("demand", "capacity", "waiting", "pending", "oldest_s", "running", "arrivals_per_s", "preemptions")


def decision_line(decision: Decision) -> str:
    """`level 0 -> 4 down (slo_met_at_deeper) demand=90 capacity=64 waiting=3; forecast: level 0 ttft 4.1 s late 60 %,
    level 4 ttft 1.2 s late 0 %`; inputs that were not known are left out, and so is the forecast if there was none."""
    inputs = " ".join(
        f"{name}={decision.inputs[name]:g}" for name in SHOWN_INPUTS if decision.inputs.get(name, -1) >= 0
    )
    change = f"level {decision.level_from} -> {decision.level_to} {decision.action} ({decision.reason})"
    line = f"{change} {inputs}".rstrip()
    if decision.considered:
        line += "; forecast: " + ", ".join(_forecast(level) for level in decision.considered)
    return line if decision.met else f"{line}; the SLOs cannot be met"


def _forecast(level: Considered) -> str:
    tpot = f" tpot {1e3 * level.tpot_s:.3g} ms" if level.tpot_s else ""
    return f"level {level.level} ttft {level.ttft_s:.3g} s{tpot} late {100 * level.late:.3g} %"


class DecisionLog:
    """Writes each change of level as one line that ends with its time; decisions to hold are left to the metrics.

    It has a handler of its own: what the controller does is shown at INFO whatever level the rest is logged at.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._logger = logging.getLogger(LOGGER)
        if enabled and not self._logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("morph: %(message)s"))
            self._logger.addHandler(handler)
            self._logger.setLevel(logging.INFO)
            self._logger.propagate = False  # or the root handler would write the line again

    def __call__(self, decisions: Sequence[Decision]) -> None:
        """Decisions in the order in which they were made."""
        if self._enabled:
            monotonic_to_unix = time.time() - time.monotonic()
            for decision in decisions:
                if decision.action != "hold":
                    at = datetime.fromtimestamp(decision.at_s + monotonic_to_unix, timezone.utc)
                    self._logger.info("%s at=%s", decision_line(decision), at.isoformat(timespec="milliseconds"))
