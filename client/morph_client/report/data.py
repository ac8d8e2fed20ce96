"""One load run with everything a report needs, and its form as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from morph_client.decision_log import Change
from morph_client.demo_load import PhaseSpan
from morph_client.precision import TokenBin
from morph_client.sampler import TimedState
from morph_client.state import ServerState
from morph_client.stats import RequestRecord, Summary


@dataclass(frozen=True)
class Run:
    """A finished load run."""

    mode: str
    """The controller's mode, such as ``off`` or ``balanced``."""
    label: str
    """What the run is called in tables and legends."""
    records: Sequence[RequestRecord]
    summary: Summary
    states: Sequence[TimedState] = field(default=())
    """The server's state over time; empty if its metrics could not be read."""
    precision: Sequence[TokenBin] = field(default=())
    """Output tokens by second and rung; empty if the server does not tell."""
    by_level: Mapping[int, int] = field(default_factory=dict)
    """Output tokens by the level at which they were computed."""
    changes: Sequence[Change] = field(default=())
    """What the controller did."""

    @property
    def max_kv_blocks(self) -> int | None:
        """The largest KV capacity seen."""
        return _whole([s.state.kv_capacity for s in self.states])

    @property
    def max_level(self) -> int | None:
        """The highest level seen, by the metrics or by any token."""
        levels: list[float | None] = [s.state.level for s in self.states if s.state.level is not None]
        if self.summary.rung_share is not None:
            levels.append(self.summary.max_level)
        return _whole(levels)

    @property
    def max_queue(self) -> int | None:
        """The longest queue seen, Triton's and the engine's together."""
        return _whole([s.state.queued for s in self.states])

    @property
    def preemptions(self) -> int | None:
        """Requests preempted during the run."""
        return round(self.states[-1].state.preemptions - self.states[0].state.preemptions) if self.states else None

    @property
    def peak_kv_share(self) -> float | None:
        """The most KV blocks that were live, as a share of those at level 0."""
        shares = [s.state.kv_used / s.state.kv_base for s in self.states if s.state.kv_used and s.state.kv_base]
        return max(shares, default=None)

    @property
    def return_s(self) -> float | None:
        """Seconds from the end of the backlog, with live KV within base capacity, to level 0; ``None`` if it was never
        left, or not reached again."""
        levels = [s.state.level or 0 for s in self.states]
        if not any(levels) or levels[-1]:
            return None
        left = max(i for i, level in enumerate(levels) if level)
        pressed = [
            s.at_s for s in self.states if s.state.queued or (s.state.kv_used or 0) > (s.state.kv_base or float("inf"))
        ]
        return max(0.0, self.states[left + 1].at_s - max(pressed, default=0.0))


def run_to_json(run: Run) -> dict[str, Any]:
    """The run as plain values. Times are in seconds from the start of the run."""
    return {
        "mode": run.mode,
        "label": run.label,
        "summary": asdict(run.summary),
        "max_level": run.max_level,
        "max_kv_blocks": run.max_kv_blocks,
        "max_queue": run.max_queue,
        "preemptions": run.preemptions,
        "peak_kv_share": run.peak_kv_share,
        "return_s": run.return_s,
        "by_level": {str(level): run.by_level[level] for level in sorted(run.by_level)},
        "changes": [asdict(c) for c in run.changes],
        "requests": [_record_to_json(r) for r in run.records],
        "precision": [asdict(b) for b in run.precision],
        "samples": [{"at_s": round(s.at_s, 3), **_state_to_json(s.state)} for s in run.states],
    }


def _record_to_json(record: RequestRecord) -> dict[str, Any]:
    plain = asdict(record)
    gaps = plain.pop("gaps_s")
    if record.text is None:
        plain.pop("text")
    return {
        **plain, "ttft_s": record.ttft_s, "tpot_s": record.tpot_s, "e2e_s": record.e2e_s,
        "longest_gap_s": max(gaps, default=None),
    }  # fmt: skip


def spans_to_json(spans: Sequence[PhaseSpan]) -> list[dict[str, Any]]:
    """The phases as plain values."""
    return [asdict(span) for span in spans]


def _state_to_json(state: ServerState) -> dict[str, Any]:
    return {
        "level": state.level,
        "kv_capacity": state.kv_capacity,
        "kv_used": state.kv_used,
        "kv_base": state.kv_base,
        "pending": state.pending,
        "waiting": state.waiting,
        "running": state.running,
        "generated_tokens": state.generated_tokens,
        "preemptions": state.preemptions,
    }


def _whole(values: Sequence[float | None]) -> int | None:
    known = [v for v in values if v is not None]
    return round(max(known)) if known else None
