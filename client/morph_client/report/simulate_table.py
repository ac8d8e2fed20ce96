"""The tables of ``morph simulate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from morph_client.report.table import percent, seconds

Row = Mapping[str, Any]


def describe(report: Row) -> str:
    """What was simulated, in one line."""
    trace, bursts = report["trace"], report["bursts"]
    busy = sum(end - begin for begin, end in bursts)
    return (
        f"{trace['source']}: {trace['requests']} requests in {trace['seconds']:.1f} s on {report['profile']}; at full "
        f"precision {len(bursts)} bursts, {busy:.1f} s in all. TTFT target {seconds(report['slo_s'])}. "
        f"Simulated in {report['took']['wall_s']:.2f} s."
    )


def render(report: Row) -> list[Table]:
    """The runs, then each sweep, then the fleets."""
    tables = [_runs(report["runs"], report["rungs"])]
    tables += [_sweep(sweep["name"], sweep["rows"]) for sweep in report["sweeps"]]
    return [*tables, _fleets(report["fleets"])] if report["fleets"] else tables


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=place > 0)
    return table


def _runs(rows: Sequence[Row], rungs: Sequence[str]) -> Table:
    table = _table(
        "", "TTFT p50", "p95", "p99", "TPOT p95", "late", "goodput/s", "/".join(rungs), "calm", "level", "turns",
        "preempted",
    )  # fmt: skip
    for row in rows:
        ttft, tpot = row["ttft_s"], row["tpot_s"]
        table.add_row(
            row["label"],
            *(seconds(ttft[name]) for name in ("p50", "p95", "p99")),
            seconds(None if tpot is None else tpot["p95"]),
            percent(row["slo_violation_share"]),
            f"{row['goodput_per_s']:.2f}",
            "/".join(f"{100 * row['rung_shares'][rung]:.0f}" for rung in rungs),
            percent(row["full_precision_share_outside_bursts"]),
            str(row["max_level"]),
            str(row["reversals"]),
            str(row["preemptions"]),
        )
    table.caption = "calm: full-precision share of the tokens outside bursts; turns: reversals of the level's direction"
    table.caption_justify = "left"
    return table


def _sweep(name: str, rows: Sequence[Row]) -> Table:
    table = _table(name, "", "TTFT p50", "p95", "late", "full precision", "level", "turns")
    for row in rows:
        table.add_row(
            f"{row[name]:g}",
            row["label"],
            seconds(row["ttft_s"]["p50"]),
            seconds(row["ttft_s"]["p95"]),
            percent(row["slo_violation_share"]),
            percent(row["full_precision_share"]),
            str(row["max_level"]),
            str(row["reversals"]),
        )
    return table


def _fleets(rows: Sequence[Row]) -> Table:
    table = _table("servers", "", "GPU hours", "most", "TTFT p50", "p95", "p99", "late", "full precision")
    for row in rows:
        table.add_row(
            str(row["servers"]),
            row["label"],
            f"{row['gpu_hours']:.2f}",
            str(row["servers_most"]),
            *(seconds(row["ttft_s"][name]) for name in ("p50", "p95", "p99")),
            percent(row["slo_violation_share"]),
            percent(row["full_precision_share"]),
        )
    return table
