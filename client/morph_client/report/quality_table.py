"""The tables of ``morph quality`` and ``morph profile``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def describe(report: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    text = report["text"]
    return (
        f"{report['model']}, {report['layers']} layers, {report['dtype']} on {report['device']}: "
        f"{text['windows']} windows of {text['window_tokens']} tokens of {text['name']}, "
        f"{text['predicted_tokens']} predictions"
    )


def series_name(report: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    """What tells a series from the others of its report: the ladder, and source of W4 and order where they differ."""
    parts = ["→".join(rung.upper() for rung in one["ladder"])]
    if len({each["w4"] for each in report["series"]} - {""}) > 1 and one["w4"]:
        parts.append(one["w4"].upper())
    if len({each["order"] for each in report["series"]}) > 1:
        parts.append(one["order"])
    return ", ".join(parts)


def render(report: Mapping[str, Any]) -> Table:
    """One line per level; the first is full precision."""
    # Narrow enough for 80 columns; a long name of a series folds.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", max_width=24)
    for name in ("level", "full/w8/w4", "bytes", "perplexity", "change", "KL", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    full = report["full"]
    whole = f"{report['layers']}/0/0"
    table.add_row("full", "0", whole, "100 %", f"{full['perplexity']:.3f}", "", "0", "100 %", end_section=True)
    for one in report["series"]:
        for place, row in enumerate(one["rows"]):
            table.add_row(
                series_name(report, one) if place == 0 else "",
                str(row["level"]),
                f"{row['full']}/{row['w8']}/{row['w4']}",
                f"{row['layer_bytes_share'] * 100:.0f} %",
                f"{row['perplexity']:.3f}",
                f"{row['perplexity_change'] * 100:+.2f} %",
                f"{row['kl']:.5f}",
                f"{row['top1'] * 100:.1f} %",
                end_section=place + 1 == len(one["rows"]),
            )
    return table


def render_order(rung: str, scores: Sequence[Mapping[str, Any]]) -> Table:
    """One line per layer, the first to be quantized first."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", title_justify="left")
    for name in (rung, "layer", "LTS", "LRS", "MDS", "LIS"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, one in enumerate(scores, 1):
        values = (f"{one[name]:.6f}" for name in ("lts", "lrs", "mds", "lis"))
        table.add_row(str(place), str(one["layer"]), *values)
    return table
