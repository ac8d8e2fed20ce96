"""The picture of ``morph quality``: what a level costs against the memory that it leaves to the layers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morph_client.palette import ACCENT, RUNG_STYLE, Theme, light
from morph_client.report.plot import require_matplotlib, style_axis
from morph_client.report.quality_table import describe, series_name

_WIDTH_IN, _HEIGHT_IN = 10.0, 8.6
_COLOURS = (RUNG_STYLE["w4"], RUNG_STYLE["full"], RUNG_STYLE["w8"], ACCENT, "#7a5ea8")
_LADDER_COLOURS = {"w4": RUNG_STYLE["w4"], "w8": RUNG_STYLE["w8"], "w8,w4": ACCENT}
_LEGEND_COLUMNS = 4
_RANDOM = "random:"
_THIN = 1.2


@dataclass(frozen=True)
class _Panel:
    """One figure of the rows."""

    title: str
    value: Callable[[Mapping[str, Any]], float]
    error: Callable[[Mapping[str, Any]], float]


_PANELS = (
    _Panel(
        "Perplexity against full precision, % (band: standard error)",
        lambda row: 100 * float(row["perplexity_change"]),
        lambda row: 100 * float(row["loss_change_error"]),
    ),
    _Panel(
        "KL divergence from full precision, nats per token", lambda r: float(r["kl"]), lambda r: float(r["kl_error"])
    ),
    _Panel(
        "Predictions whose likeliest token is that of full precision, %", lambda r: 100 * float(r["top1"]), lambda _: 0
    ),
)


def write_png(report: Mapping[str, Any], path: Path, theme: Theme | None = None) -> None:
    """Draws a PNG. Raises :class:`MissingDependency`, or ``OSError`` if the file cannot be written."""
    require_matplotlib()
    theme = theme or light()
    figure = importlib.import_module("matplotlib.figure").Figure((_WIDTH_IN, _HEIGHT_IN), facecolor=theme.background)
    axes = figure.subplots(len(_PANELS), 1, sharex=True)
    figure.subplots_adjust(left=0.075, right=0.98, top=0.84, bottom=0.075, hspace=0.3)
    for axis, panel in zip(axes, _PANELS, strict=True):
        style_axis(axis, theme)
        axis.set_title(panel.title, loc="left", fontsize=10.5, color=theme.text, pad=5, fontweight="bold")
        for one, colour, width in _styled(report["series"], theme):
            _line(axis, report, one, panel, colour, width)
    axes[-1].invert_xaxis()
    axes[-1].set_xlabel("bytes of the layers, % of full precision", fontsize=10, color=theme.muted, labelpad=6)
    figure.text(0.075, 0.965, "Quality by level", fontsize=15, fontweight="bold", color=theme.text, va="center")
    figure.text(0.075, 0.932, describe(report), fontsize=10.5, color=theme.muted, va="center")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.067, 0.922), ncols=_LEGEND_COLUMNS, frameon=False,
        fontsize=9.5, labelcolor=theme.text, borderpad=0,
    )  # fmt: skip
    figure.savefig(path, dpi=130, facecolor=figure.get_facecolor())


def _styled(series: Sequence[Mapping[str, Any]], theme: Theme) -> list[tuple[Mapping[str, Any], str, float]]:
    """Each series with colour and width. Of one order, ladders have their colours; of several, orders have, and random
    ones are the grey background that others stand out from."""
    if len({one["order"] for one in series}) == 1:
        return [(one, _LADDER_COLOURS[",".join(one["ladder"])], 2.0) for one in series]
    named = [one for one in series if not one["order"].startswith(_RANDOM)]
    others = [(one, theme.load, _THIN) for one in series if one["order"].startswith(_RANDOM)]
    # Later lines are thinner, so that one which lies under another can still be seen.
    return others + [(one, _COLOURS[i % len(_COLOURS)], max(1.6, 3.0 - 0.4 * i)) for i, one in enumerate(named)]


def _line(
    axis: Any, report: Mapping[str, Any], one: Mapping[str, Any], panel: _Panel, colour: str, width: float
) -> None:
    rows = [{"layer_bytes_share": 1.0, **report["full"]}, *one["rows"]]
    places = [100 * row["layer_bytes_share"] for row in rows]
    values, errors = [panel.value(row) for row in rows], [panel.error(row) for row in rows]
    style = "--" if one["w4"] == "awq" else "-"
    axis.plot(
        places, values, style, color=colour, linewidth=width, marker="o", markersize=3, label=series_name(report, one)
    )
    if any(errors) and width > _THIN:
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        axis.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
