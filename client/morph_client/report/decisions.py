"""The controller's changes of level as a section of a page."""

from __future__ import annotations

from collections.abc import Sequence

from morph_client.decision_log import lines
from morph_client.report.data import Run
from morph_client.report.html import Log

_ABOUT = (
    "Each line is a change of level: when, from which level to which (▼ fewer bits, ▲ more), the controller's reason, "
    "and what it saw. Blocks are KV blocks: demand is what all present and waiting requests would hold, capacity what "
    "there is; waiting and pending are requests in the engine's line and in Triton's queue."
)
_ABOUT_SAMPLES = (
    "Seen from outside, on the metrics page: each line is a change of level between two readings, with the reasons "
    "that were counted in between (▼ fewer bits, ▲ more), the requests that waited and ran, and KV blocks live of all."
)


def section(run: Run, from_metrics: bool = False) -> Log:
    """The log of a run; it says so if nothing changed."""
    return log_of(run.label, lines(run.changes), from_metrics)


def log_of(label: str, told: Sequence[str], from_metrics: bool = False) -> Log:
    """The same, of lines that are there already."""
    about = _ABOUT_SAMPLES if from_metrics else _ABOUT
    return Log(f"What the controller did: {label}", about, told or ["It never changed the level."])
