"""The table of one or more runs, and the sentence below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from morph_client.agreement import Agreement
from morph_client.report.data import Run
from morph_client.stats import percentile

NOTHING = "–"


@dataclass(frozen=True)
class Row:
    """One line: a name and one value per run."""

    name: str
    values: tuple[str, ...]
    heads_group: bool = False
    """True where a new group of lines begins."""


def seconds(value: float | None) -> str:
    """A time for reading: ``240 ms``, ``1.32 s``."""
    if value is None:
        return NOTHING
    return f"{value * 1000:.0f} ms" if value < 0.9995 else f"{value:.2f} s"


def percent(share: float | None) -> str:
    """A share for reading. Only a true 100 % and 0 % are written so."""
    if share is None:
        return NOTHING
    text = f"{share * 100:.1f}"
    if text == "100.0" and share < 1:
        return "> 99.9 %"
    return "100 %" if text == "100.0" else "0 %" if share == 0 else f"{text} %"


def summary_rows(runs: Sequence[Run]) -> list[Row]:
    """The lines that a single run and a comparison share."""
    s = [run.summary for run in runs]
    rows = [
        Row("requests", tuple(str(x.requests) for x in s)),
        Row("errors", tuple(str(x.errors) for x in s)),
        Row("TTFT mean", tuple(seconds(x.ttft_s.mean) for x in s), heads_group=True),
        Row("TTFT p50", tuple(seconds(x.ttft_s.p50) for x in s)),
        Row("TTFT p95", tuple(seconds(x.ttft_s.p95) for x in s)),
        Row("TTFT p99", tuple(seconds(x.ttft_s.p99) for x in s)),
        Row("TPOT p50", tuple(seconds(x.tpot_s.p50) for x in s)),
        Row("TPOT p95", tuple(seconds(x.tpot_s.p95) for x in s)),
        Row("ITL p50", tuple(seconds(x.itl_s.p50) for x in s)),
        Row("ITL p99", tuple(seconds(x.itl_s.p99) for x in s)),
        Row("end to end p50", tuple(seconds(x.e2e_s.p50) for x in s)),
        Row("end to end p95", tuple(seconds(x.e2e_s.p95) for x in s)),
        Row("output tokens per second", tuple(f"{x.output_tokens_per_s:.1f}" for x in s), heads_group=True),
        Row("requests per second", tuple(f"{x.requests_per_s:.2f}" for x in s)),
        Row("preemptions", tuple(_count(run.preemptions) for run in runs)),
    ]
    if any(x.slo_violations is not None for x in s):
        rows.append(Row("targets missed", tuple(_count(x.slo_violations) for x in s)))
        rows.append(Row("goodput, requests per second", tuple(_rate(x.goodput_per_s) for x in s)))
    rows.append(
        Row("tokens with every layer at full precision", tuple(percent(x.level0_share) for x in s), heads_group=True)
    )
    for rung in ("full", "w8", "w4"):
        shares = tuple(percent(None if x.rung_share is None else getattr(x.rung_share, rung)) for x in s)
        rows.append(Row(f"  layer-weighted share at {rung}", shares))
    rows.append(Row("most live KV, of base capacity", tuple(_share(run.peak_kv_share) for run in runs)))
    return rows + _class_rows(runs)


def _class_rows(runs: Sequence[Run]) -> list[Row]:
    """The wait of each service class, if the trace names any."""
    classes = sorted({r.slo_class for run in runs for r in run.records if r.slo_class is not None})
    rows = []
    for i, name in enumerate(classes):
        waits = [[r.ttft_s for r in run.records if r.slo_class == name and r.ttft_s is not None] for run in runs]
        values = tuple(seconds(percentile(of_run, 95)) if of_run else NOTHING for of_run in waits)
        rows.append(Row(f"TTFT p95, class {name}", values, heads_group=i == 0))
    return rows


def agreement_rows(found: Sequence[Agreement | None]) -> list[Row]:
    """How far outputs agree with a reference; no lines if there is none."""
    if not any(found):
        return []
    return [
        Row(
            "outputs equal to the reference",
            tuple(percent(None if a is None else a.equal) for a in found),
            heads_group=True,
        ),
        Row("  common beginning, of characters", tuple(percent(None if a is None else a.common_prefix) for a in found)),
        Row("  same words at the same place", tuple(percent(None if a is None else a.same_words) for a in found)),
    ]


def comparison_rows(runs: Sequence[Run]) -> list[Row]:
    """The demo's lines."""
    s = [run.summary for run in runs]
    return [
        Row("requests", tuple(str(x.requests) for x in s)),
        Row("errors", tuple(str(x.errors) for x in s)),
        Row("TTFT p50", tuple(seconds(x.ttft_s.p50) for x in s), heads_group=True),
        Row("TTFT p95", tuple(seconds(x.ttft_s.p95) for x in s)),
        Row("TPOT p50", tuple(seconds(x.tpot_s.p50) for x in s)),
        Row("TPOT p95", tuple(seconds(x.tpot_s.p95) for x in s)),
        Row("output tokens per second", tuple(f"{x.output_tokens_per_s:.1f}" for x in s), heads_group=True),
        Row("tokens at full precision", tuple(percent(x.level0_share) for x in s)),
        Row("highest level", tuple(_count(run.max_level) for run in runs), heads_group=True),
        Row("most KV blocks", tuple(_count(run.max_kv_blocks) for run in runs)),
        Row("longest queue", tuple(_count(run.max_queue) for run in runs)),
        Row("preemptions", tuple(_count(run.preemptions) for run in runs)),
    ]


def render(rows: Sequence[Row], runs: Sequence[Run]) -> Table:
    """The rows as a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(run.label, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(row.name, *row.values, end_section=i + 1 < len(rows) and rows[i + 1].heads_group)
    return table


def verdict(off: Run, on: Run) -> str:
    """What the comparison says, in one honest sentence."""
    before, after = off.summary.ttft_s.p95, on.summary.ttft_s.p95
    if before is None or after is None:
        return "No run has enough complete answers to compare, so this says nothing about morphing."
    change = f"p95 time to first token {seconds(before)} without morphing, {seconds(after)} with it"
    failed = on.summary.errors - off.summary.errors
    if failed > 0:
        return f"Morphing did not help here: {failed} more requests failed with it ({change})."
    if not on.max_level:
        return f"The server never morphed: the burst was not enough to need it on this machine ({change})."
    if after > before * 1.05:
        return f"Morphing did not help here: it made the wait longer ({change})."
    if after > before * 0.95:
        return f"Morphing made no real difference here ({change})."
    full = percent(on.summary.level0_share)
    return (
        f"Morphing cut the p95 time to first token by {(1 - after / before) * 100:.0f} %, "
        f"from {seconds(before)} to {seconds(after)}; {full} of the tokens still came at full precision."
    )


def _count(value: int | None) -> str:
    return NOTHING if value is None else str(value)


def _rate(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value * 100:.0f} %"
