"""One load run with everything a report needs, and its form as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from morph_client.demo_load import PhaseSpan
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
        "requests": [{**asdict(r), "ttft_s": r.ttft_s, "tpot_s": r.tpot_s, "e2e_s": r.e2e_s} for r in run.records],
        "samples": [{"at_s": round(s.at_s, 3), **_state_to_json(s.state)} for s in run.states],
    }


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
