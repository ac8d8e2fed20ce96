"""The outcome of a comparison as plain values: what the table, the picture and the page are made from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from morph_client.agreement import agreement
from morph_client.compare.configurations import BASELINE, Configuration
from morph_client.compare.scoring import Score, change, quality
from morph_client.report.data import Run

PAPER = {"ttft_p95_ratio": [2.9, 15.7], "slo_violations_change": -0.9245}
"""MorphServe's default mode over full precision, as published (arXiv 2506.02006): other models, GPUs and traces."""


@dataclass(frozen=True)
class OneRun:
    """A finished run, and the scores of its outputs by request."""

    configuration: Configuration
    repeat: int
    run: Run
    scores: Mapping[int, Score]
    level_loss: float | None = None
    """Relative change of perplexity by the levels of its tokens, from a table of `morph quality`."""


def build(runs: Sequence[OneRun], configurations: Sequence[Configuration]) -> dict[str, Any]:
    """Figures of every run, and of every configuration over its repeats."""
    full = {one.repeat: one for one in runs if one.configuration.name == BASELINE}
    burst = _burst([one.run for one in full.values()])
    told = []
    for configuration in configurations:
        own = [one for one in runs if one.configuration.name == configuration.name]
        figures = [_figures(one, full[one.repeat], burst) for one in own]
        told.append(
            {
                "name": configuration.name,
                "label": configuration.label,
                "morphs": configuration.morphs,
                "environment": configuration.environment,
                "figures": _over_repeats(figures),
                "perplexity_change": _change(own, list(full.values())),
                "runs": [
                    {"repeat": one.repeat, "figures": f, "series": _series(one.run)}
                    for one, f in zip(own, figures, strict=True)
                ],
            }
        )
    return {"burst_s": burst, "paper": PAPER, "configurations": told}


def _figures(one: OneRun, full: OneRun, burst: Sequence[float] | None) -> dict[str, float | None]:
    run, s = one.run, one.run.summary
    reference = {r.index: r.text for r in full.run.records if r.error is None and r.text is not None}
    pairs = [
        (r.text, reference[r.index])
        for r in run.records
        if r.error is None and r.text is not None and r.index in reference
    ]
    same, written = agreement(pairs), quality(one.scores)
    share = s.rung_share
    return {
        "requests": s.requests,
        "errors": s.errors,
        "ttft_p50_s": s.ttft_s.p50,
        "ttft_p95_s": s.ttft_s.p95,
        "ttft_p99_s": s.ttft_s.p99,
        "ttft_p95_ratio": _ratio(full.run.summary.ttft_s.p95, s.ttft_s.p95),
        "tpot_p50_s": s.tpot_s.p50,
        "tpot_p95_s": s.tpot_s.p95,
        "itl_p99_s": s.itl_s.p99,
        "e2e_p95_s": s.e2e_s.p95,
        "slo_violations": s.slo_violations,
        "slo_violations_change": _less(s.slo_violations, full.run.summary.slo_violations),
        "goodput_per_s": s.goodput_per_s,
        "output_tokens_per_s": s.output_tokens_per_s,
        "preemptions": run.preemptions,
        "level0_share": s.level0_share,
        "full_share": None if share is None else share.full,
        "w8_share": None if share is None else share.w8,
        "w4_share": None if share is None else share.w4,
        "full_share_outside_burst": _outside(run, burst),
        "max_level": run.max_level,
        "max_kv_blocks": run.max_kv_blocks,
        "peak_kv_share": run.peak_kv_share,
        "return_s": run.return_s,
        "scored_tokens": None if written is None else written.tokens,
        "perplexity": None if written is None else written.perplexity,
        "level_loss": one.level_loss,
        "equal_to_full": None if same is None else same.equal,
        "common_prefix": None if same is None else same.common_prefix,
        "max_lateness_s": s.max_lateness_s,
    }


def _over_repeats(figures: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float] | None]:
    """Median, least and most of each figure; ``None`` where a repeat has none."""
    told: dict[str, dict[str, float] | None] = {}
    for name in figures[0]:
        values = [f[name] for f in figures]
        known = [v for v in values if v is not None]
        whole = len(known) == len(values)
        told[name] = {"median": statistics.median(known), "min": min(known), "max": max(known)} if whole else None
    return told


def _change(own: Sequence[OneRun], full: Sequence[OneRun]) -> dict[str, float] | None:
    found = change(_pooled(own), _pooled(full))
    return None if found is None else {"mean": found[0], "standard_error": found[1]}


def _pooled(runs: Sequence[OneRun]) -> dict[int, Score]:
    """The scores of each request over all repeats."""
    pooled: dict[int, Score] = {}
    for one in runs:
        for index, score in one.scores.items():
            before = pooled.get(index, Score(0, 0.0))
            pooled[index] = Score(before.tokens + score.tokens, before.nll + score.nll)
    return pooled


def _burst(runs: Sequence[Run]) -> list[float] | None:
    """From the first to the last moment at which requests waited at full precision, over all repeats."""
    waited = [s.at_s for run in runs for s in run.states if s.state.queued]
    return [min(waited), max(waited)] if waited else None


def _outside(run: Run, burst: Sequence[float] | None) -> float | None:
    """Share of full precision, weighted by layer, among the tokens that came before or after the burst."""
    if burst is None:
        return None
    bins = [b for b in run.precision if b.at_s + 1 <= burst[0] or b.at_s >= burst[1]]
    tokens = sum(b.tokens for b in bins)
    return sum(b.rungs.full for b in bins) / tokens if tokens else None


def _ratio(full: float | None, own: float | None) -> float | None:
    return full / own if full is not None and own else None


def _less(own: int | None, full: int | None) -> float | None:
    return own / full - 1 if own is not None and full else None


def _series(run: Run) -> dict[str, Any]:
    """What the picture shows over time, as columns; times rounded to milliseconds."""
    known = [r for r in run.records if r.ttft_s is not None]
    return {
        "requests": {
            "due_s": [round(r.due_s, 3) for r in known],
            "ttft_s": [round(r.ttft_s or 0.0, 3) for r in known],
        },
        "state": {
            "at_s": [round(s.at_s, 2) for s in run.states],
            "level": [s.state.level for s in run.states],
            "level_max": max((s.state.level_max or 0 for s in run.states), default=0),
            "kv_capacity": [s.state.kv_capacity for s in run.states],
            "kv_used": [s.state.kv_used for s in run.states],
            "queued": [s.state.queued for s in run.states],
        },
        "precision": {
            "at_s": [b.at_s for b in run.precision],
            **{r: [round(getattr(b.rungs, r), 2) for b in run.precision] for r in ("full", "w8", "w4")},
        },
        "changes": [asdict(c) for c in run.changes],
    }
