"""The tables of ``morph simulate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table

from morph_client.report.table import percent, seconds

Row = Mapping[str, Any]

_GAP = 2
"""Columns of the terminal between two columns of a table."""


def describe(report: Row) -> str:
    """What was simulated, in one line."""
    trace, bursts = report["trace"], report["bursts"]
    busy = sum(end - begin for begin, end in bursts)
    times = "burst" if len(bursts) == 1 else "bursts"
    return (
        f"{trace['source']}: {trace['requests']} requests in {trace['seconds']:.1f} s on {report['profile']}; at full "
        f"precision {len(bursts)} {times}, {busy:.1f} s in all. TTFT target {seconds(report['slo_s'])}. "
        f"Simulated in {report['took']['wall_s']:.2f} s."
    )


def render(report: Row, width: int) -> list[Table]:
    """The runs, then each sweep, then the fleets, for a terminal of ``width`` columns."""
    tables = _runs(report["runs"], report["rungs"], width)
    for sweep in report["sweeps"]:
        tables += _sweep(sweep["name"], sweep["rows"], width)
    return [*tables, *_fleets(report["fleets"], width)] if report["fleets"] else tables


def _runs(rows: Sequence[Row], rungs: Sequence[str], width: int) -> list[Table]:
    names = (
        "", "TTFT p50", "p95", "p99", "TPOT p95", "late", "goodput/s", "/".join(rungs), "calm", "level", "turns",
        "preempted",
    )  # fmt: skip
    told = [
        (
            row["label"],
            *_waits(row, "p50", "p95", "p99"),
            seconds(None if row["tpot_s"] is None else row["tpot_s"]["p95"]),
            percent(row["slo_violation_share"]),
            f"{row['goodput_per_s']:.2f}",
            "/".join(f"{100 * row['rung_shares'][rung]:.0f}" for rung in rungs),
            percent(row["full_precision_share_outside_bursts"]),
            str(row["max_level"]),
            str(row["reversals"]),
            str(row["preemptions"]),
        )
        for row in rows
    ]
    tables = _fitting(names, told, 1, width)
    tables[-1].caption = (
        "late: share of the requests that missed a target; calm: full-precision share of the tokens outside bursts; "
        "turns: reversals of the level's direction"
    )
    tables[-1].caption_justify = "left"
    return tables


def _sweep(name: str, rows: Sequence[Row], width: int) -> list[Table]:
    told = [
        (
            f"{row[name]:g}",
            row["label"],
            *_waits(row, "p50", "p95"),
            percent(row["slo_violation_share"]),
            percent(row["full_precision_share"]),
            str(row["max_level"]),
            str(row["reversals"]),
        )
        for row in rows
    ]
    return _fitting((name, "", "TTFT p50", "p95", "late", "full", "level", "turns"), told, 2, width)


def _fleets(rows: Sequence[Row], width: int) -> list[Table]:
    told = [
        (
            str(row["servers"]),
            row["label"],
            f"{row['gpu_hours']:.2f}",
            str(row["servers_most"]),
            *_waits(row, "p50", "p95", "p99"),
            percent(row["slo_violation_share"]),
            percent(row["full_precision_share"]),
        )
        for row in rows
    ]
    return _fitting(("servers", "", "GPU hours", "most", "TTFT p50", "p95", "p99", "late", "full"), told, 2, width)


def _waits(row: Row, *quantiles: str) -> tuple[str, ...]:
    return tuple(seconds(row["ttft_s"][name]) for name in quantiles)


def _fitting(names: Sequence[str], rows: Sequence[Sequence[str]], labels: int, width: int) -> list[Table]:
    """One table, or several that repeat the first ``labels`` columns where one would be wider than ``width``.

    No figure is ever cut: a table of one column of figures may be too wide.
    """
    widths = [max(map(cell_len, column)) + _GAP for column in zip(names, *rows, strict=True)]
    room = width + _GAP - sum(widths[:labels])
    parts: list[list[int]] = [[]]
    for place in range(labels, len(names)):
        if parts[-1] and sum(widths[p] for p in parts[-1]) + widths[place] > room:
            parts.append([])
        parts[-1].append(place)
    return [_table(names, rows, [*range(labels), *part], labels) for part in parts]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], places: Sequence[int], labels: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for place in places:
        table.add_column(names[place], justify="left" if place < labels else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[place] for place in places))
    return table
