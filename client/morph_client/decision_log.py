"""What the controller did in a run: from the server's log where that is at hand, else from its metrics."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from morph_client.sampler import TimedState

_LINE = re.compile(r"morph: level (\d+) -> (\d+) (\w+) \(([^)]*)\)(.*)")
_PAIR = re.compile(r"(\w+)=(\S+)")


@dataclass(frozen=True)
class Change:
    """One change of level."""

    at_s: float | None
    """From the start of the run; ``None`` if the log does not tell."""
    level_from: int
    level_to: int
    reason: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What it was decided on, as the server wrote it."""


def read_log(path: Path, started_unix_s: float) -> list[Change]:
    """The changes that a server's log tells, in order. Fields that are not known are kept as they are.

    Args:
        path: the server's output.
        started_unix_s: when the run began.
    """
    changes = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = _LINE.search(line)
        if found:
            inputs = dict(_PAIR.findall(found[5]))
            at_s = _seconds(inputs.pop("at", ""), started_unix_s)
            changes.append(Change(at_s, int(found[1]), int(found[2]), found[4], inputs))
    return [change for change in changes if change.at_s is None or change.at_s >= 0]


def _seconds(stamp: str, started_unix_s: float) -> float | None:
    try:
        return datetime.fromisoformat(stamp).timestamp() - started_unix_s
    except ValueError:  # a server that writes no time, or another one
        return None


def from_samples(states: Sequence[TimedState]) -> list[Change]:
    """The changes between two readings of the metrics, with the reasons that were counted in between."""
    changes = []
    for before, now in itertools.pairwise(states):
        old, new = before.state, now.state
        if old.level is None or new.level is None or old.level == new.level:
            continue
        action = "down" if new.level > old.level else "up"
        reasons = [
            reason
            for (what, reason), count in new.decisions.items()
            if what == action and count > old.decisions.get((what, reason), 0.0)
        ]
        inputs = {"queue": f"{new.queued:.0f}", "running": f"{new.running:.0f}"}
        if new.kv_used is not None and new.kv_capacity is not None:
            inputs["kv"] = f"{new.kv_used:.0f}/{new.kv_capacity:.0f}"
        changes.append(Change(now.at_s, old.level, new.level, ", ".join(reasons) or "decided before", inputs))
    return changes


def lines(changes: Iterable[Change]) -> list[str]:
    """One line each, for a person."""
    told = []
    for change in changes:
        when = "" if change.at_s is None else f"{change.at_s:7.2f} s  "
        inputs = "  ".join(f"{name} {value}" for name, value in change.inputs.items())
        arrow = "▼" if change.level_to > change.level_from else "▲"
        step = f"{arrow} level {change.level_from:>2} → {change.level_to:<2}"
        told.append(f"{when}{step}  {change.reason:<16} {inputs}".rstrip())
    return told
