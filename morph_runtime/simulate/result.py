"""What a simulation has shown: times of requests, levels of tokens, and the figures of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from morph_runtime.simulate.engine import SimulatedEngine
from morph_runtime.simulate.engine_profile import EngineProfile

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Steps:
    """The steps in order, S spans of them; a field of `records.Span` each.

    Attributes:
        begin_s, end_s: float64 [S].
        level, tokens, prefill, running, backlog, used, capacity: int64 [S].
    """

    begin_s: Floats
    end_s: Floats
    level: Ints
    tokens: Ints
    prefill: Ints
    running: Ints
    backlog: Ints
    used: Ints
    capacity: Ints


@dataclass(frozen=True)
class Result:
    """One engine after a trace.

    Attributes:
        label: what a table calls it.
        profile: the engine.
        arrival_s, ttft_s, tpot_s, e2e_s: float64 [N]; `tpot_s` is NaN for requests of one token.
        output_tokens: int64 [N].
        steps: what ran.
        changes: when the level changed, and to what.
        initial_level: before the first change.
        preemptions, refused: requests that lost their blocks; up-shifts for which too much KV was live.
        counts: decisions by action and reason.
        idle_s: when the last request had ended.
    """

    label: str
    profile: EngineProfile
    arrival_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    output_tokens: Ints
    steps: Steps
    changes: Sequence[tuple[float, int]]
    initial_level: int
    preemptions: int
    refused: int
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def idle_s(self) -> float:
        """When the last request had ended."""
        return float((self.arrival_s + self.e2e_s).max())

    @property
    def reversals(self) -> list[float]:
        """When the level began to move the other way than before."""
        found: list[float] = []
        level, direction = self.initial_level, 0
        for at_s, new in self.changes:
            now = 1 if new > level else -1
            if direction and now != direction:
                found.append(at_s)
            level, direction = new, now
        return found

    def most_reversals(self, window_s: float = 60.0) -> int:
        """The most reversals within any window."""
        times = np.array(self.reversals)
        return int(
            max((np.searchsorted(times, t + window_s, side="right") - i for i, t in enumerate(times)), default=0)
        )

    def level_at(self, at_s: Floats) -> Ints:
        """The level in force at each time."""
        times = [at for at, _ in self.changes]
        levels = np.array([self.initial_level, *(level for _, level in self.changes)], dtype=np.int64)
        return levels[np.searchsorted(times, at_s, side="right")]

    def tokens_by_level(self, outside: Sequence[Interval] = ()) -> Ints:
        """Output tokens at each level, int64 [levels]; those of steps that began within `outside` are left out."""
        tokens = np.where(within(self.steps.begin_s, outside), 0, self.steps.tokens)
        return np.bincount(self.steps.level, tokens, self.profile.max_level + 1).astype(np.int64)

    def full_share(self, outside: Sequence[Interval] = ()) -> float:
        """Share of output tokens with every layer at full precision; 1 if there are none."""
        tokens = self.tokens_by_level(outside)
        return float(tokens[0] / tokens.sum()) if tokens.sum() else 1.0

    def rung_shares(self) -> dict[str, float]:
        """Share of (token, layer) pairs at each rung."""
        costs = self.profile.costs
        pairs = self.tokens_by_level() @ costs.counts
        return dict(zip(costs.rungs, (pairs / max(pairs.sum(), 1)).tolist(), strict=True))


def result_of(engine: SimulatedEngine, label: str, initial_level: int, counts: dict[str, int] | None = None) -> Result:
    """What an engine that has served everything has to show."""
    records = engine.records
    arrival, first, last = (np.array(x) for x in (records.arrival_s, records.first_s, records.last_s))
    output = np.array(records.output, dtype=np.int64)
    columns = [np.array(column) for column in zip(*records.spans, strict=True)]
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(output > 1, (last - first) / np.maximum(output - 1, 1), math.nan)
    return Result(
        label=label,
        profile=engine.profile,
        arrival_s=arrival,
        ttft_s=first - arrival,
        tpot_s=tpot,
        e2e_s=last - arrival,
        output_tokens=output,
        steps=Steps(*columns),
        changes=engine.shifts.changes,
        initial_level=initial_level,
        preemptions=engine.preemptions,
        refused=engine.shifts.refused,
        counts=counts or {},
    )


def within(times: Floats, intervals: Sequence[Interval]) -> NDArray[np.bool_]:
    """Which times lie in one of the intervals, [begin, end); they are sorted and apart."""
    if not intervals:
        return np.zeros(len(times), dtype=np.bool_)
    begins, ends = np.array(intervals).T
    place = np.searchsorted(begins, times, side="right") - 1
    inside: NDArray[np.bool_] = (place >= 0) & (times < ends[place])
    return inside


def bursts(static: Result, merge_s: float = 1.0) -> list[Interval]:
    """The bursts of a trace: times with a nonzero backlog in a run at full precision.

    Backlog means that a request waits after the step had been chosen, for whatever reason; one that only waits for
    the present step to end does not count.

    Args:
        static: the trace at level 0 throughout.
        merge_s: bursts that are no farther apart count as one.

    Raises:
        ValueError: the run left level 0.
    """
    if static.initial_level or static.changes:
        raise ValueError("bursts are defined by a run at full precision")
    steps = static.steps
    # A step's backlog stands until the next step is chosen, or, after the last of a busy time, until it ends.
    found: list[Interval] = []
    for begin, end in zip(steps.begin_s[steps.backlog > 0], steps.end_s[steps.backlog > 0], strict=True):
        if found and begin - found[-1][1] <= merge_s:
            found[-1] = (found[-1][0], float(end))
        else:
            found.append((float(begin), float(end)))
    return found


def summary(result: Result, slo_s: float) -> dict[str, Any]:
    """The figures of a table, as plain values."""
    ttft, tpot = result.ttft_s, result.tpot_s[~np.isnan(result.tpot_s)]
    span_s = max(result.idle_s - float(result.arrival_s[0]), 1e-9)
    met = ttft <= slo_s
    steps = result.steps
    return {
        "label": result.label,
        "requests": len(ttft),
        "seconds": span_s,
        "ttft_s": {"mean": float(ttft.mean()), **_percentiles(ttft)},
        "tpot_s": _percentiles(tpot) if len(tpot) else None,
        "slo_s": slo_s,
        "slo_violations": int((~met).sum()),
        "slo_violation_share": float((~met).mean()),
        "goodput_per_s": float(met.sum() / span_s),
        "output_tokens_per_s": float(result.output_tokens.sum() / span_s),
        "full_precision_share": result.full_share(),
        "rung_shares": result.rung_shares(),
        "max_level": int(max((level for _, level in result.changes), default=result.initial_level)),
        "level_changes": len(result.changes),
        "reversals": len(result.reversals),
        "most_reversals_per_minute": result.most_reversals(),
        "preemptions": result.preemptions,
        "refused_up_shifts": result.refused,
        "base_kv_blocks": int(result.profile.capacities[0]),
        "peak_kv_blocks": int(steps.used.max()),
        "peak_backlog": int(steps.backlog.max()),
        "decisions": result.counts,
    }


def timeline(result: Result, points: int = 600) -> dict[str, list[float]]:
    """The run at equal distances of time, for a picture: level, KV blocks, backlog and arrivals per second."""
    end = max(result.idle_s, result.changes[-1][0] if result.changes else 0.0)
    edges = np.linspace(0.0, end, points + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    steps = result.steps
    place = np.clip(np.searchsorted(steps.begin_s, middle, side="right") - 1, 0, None)
    busy = (steps.begin_s[place] <= middle) & (middle < steps.end_s[place])
    level = result.level_at(middle)
    base = result.profile.capacities[level]
    return {
        "at_s": middle.tolist(),
        "level": level.tolist(),
        "kv_capacity": np.where(busy, steps.capacity[place], base).tolist(),
        "kv_used": np.where(busy, steps.used[place], 0).tolist(),
        "backlog": np.where(busy, steps.backlog[place], 0).tolist(),
        "running": np.where(busy, steps.running[place], 0).tolist(),
        "arrivals_per_s": (np.histogram(result.arrival_s, edges)[0] / np.diff(edges)).tolist(),
    }


def _percentiles(values: Floats) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)}
