"""The picture of ``morph simulate``: load, backlog, level, KV cache and first tokens over time; a fleet below."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morph_client.palette import ACCENT, FURTHER, RUNG_STYLE, Theme, light
from morph_client.report.plot import plain_axis, require_matplotlib, style_axis
from morph_client.report.simulate_table import describe

_WIDTH_IN, _PANEL_IN, _HEAD_IN, _FOOT_IN = 10.0, 1.75, 0.95, 0.62
_LEGEND_COLUMNS, _LEGEND_LINE_IN = 6, 0.2
_MODE_COLOURS = (ACCENT, *FURTHER)
_DASHES = {"precision only": ":", "growth only": "--"}
"""How an ablation differs from its mode, whose colour it has."""
_TITLES = {
    "load": "Load: requests that arrive, per second",
    "backlog": "Backlog: requests that wait",
    "level": "Level",
    "kv": "KV cache: capacity (line) and use (filled), blocks",
    "ttft": "Time to first token, by arrival, in seconds",
    "fleet": "Servers, as the autoscaler sets them",
}
_POINTS = 4000
"""First tokens of a run that are drawn, at most."""

Run = Mapping[str, Any]


def write_png(report: Run, path: Path, theme: Theme | None = None) -> None:
    """Draws a PNG. Raises :class:`MissingDependency`, or ``OSError`` if the file cannot be written."""
    require_matplotlib()
    theme = theme or light()
    fleets = [fleet for fleet in report["fleets"] if fleet["servers"] == "auto"]
    panels = [name for name in _TITLES if name != "fleet" or fleets]
    head = _HEAD_IN + _LEGEND_LINE_IN * -(-len(report["runs"]) // _LEGEND_COLUMNS)
    height = head + _PANEL_IN * len(panels) + _FOOT_IN
    figure = importlib.import_module("matplotlib.figure").Figure((_WIDTH_IN, height), facecolor=theme.background)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.075, right=0.98, top=1 - head / height, bottom=_FOOT_IN / height, hspace=0.34)
    colours = _colours(report["runs"])
    end = max(run["timeline"]["at_s"][-1] for run in report["runs"])
    for axis, panel in zip(axes, panels, strict=True):
        (style_axis if panel == "ttft" else plain_axis)(axis, theme)
        axis.set_title(_TITLES[panel], loc="left", fontsize=10.5, color=theme.text, pad=5, fontweight="bold")
        for begin, stop in report["bursts"]:
            axis.axvspan(begin, stop, color=theme.burst, linewidth=0, zorder=0)
        if panel == "load":
            times, rates = _rates(report["runs"][0]["timeline"])
            axis.fill_between(times, rates, step="post", color=theme.load, linewidth=0)
        elif panel == "fleet":
            _sizes(axis, fleets, colours, end)
        else:
            for run in report["runs"]:
                _draw(axis, panel, run, colours[run["label"]])
        axis.set_ylim(0, axis.get_ylim()[1] if panel == "ttft" else max(axis.get_ylim()[1], 1))
    axes[-1].set_xlim(0, end)
    axes[-1].set_xlabel("seconds", fontsize=10, color=theme.muted, labelpad=6)
    _head(figure, report, colours, theme, height)
    figure.savefig(path, dpi=130, facecolor=figure.get_facecolor())


def _colours(runs: Sequence[Run]) -> dict[str, str]:
    """Static rungs have the rungs' colours, modes their own, and their ablations those of their mode."""
    modes = list(dict.fromkeys(run["label"].split(",")[0] for run in runs if not run["label"].startswith("static ")))
    found = {}
    for run in runs:
        head = run["label"].split(",")[0]
        rung = head.removeprefix("static ")
        found[run["label"]] = RUNG_STYLE.get(rung) or _MODE_COLOURS[modes.index(head) % len(_MODE_COLOURS)]
    return found


def _dash(label: str) -> str:
    return _DASHES.get(label.partition(", ")[2], "-")


def _rates(line: Run) -> tuple[list[float], list[float]]:
    """Where bins begin, and arrivals per second in each: bins of a second at least, for finer ones show noise."""
    at_s, rates = line["at_s"], line["arrivals_per_s"]
    if len(at_s) < 2:
        return at_s, rates
    bin_s = at_s[1] - at_s[0]
    joined = max(1, round(1 / bin_s))
    starts = range(0, len(at_s), joined)
    means = [sum(rates[i : i + joined]) / len(rates[i : i + joined]) for i in starts]
    return [*(at_s[i] - bin_s / 2 for i in starts), at_s[-1] + bin_s / 2], [*means, means[-1]]


def _draw(axis: Any, panel: str, run: Run, colour: str) -> None:
    line = run["timeline"]
    style = {"color": colour, "linewidth": 1.5, "linestyle": _dash(run["label"])}
    if panel == "ttft":
        points = run["ttft_by_arrival"]
        kept = points[:: -(-len(points) // _POINTS)]
        axis.scatter([p[0] for p in kept], [p[1] for p in kept], s=6, color=colour, alpha=0.5, linewidths=0)
    elif panel == "kv":
        axis.plot(line["at_s"], line["kv_capacity"], drawstyle="steps-mid", **style)
        axis.fill_between(line["at_s"], line["kv_used"], step="mid", color=colour, alpha=0.15, linewidth=0)
    else:
        axis.plot(line["at_s"], line[panel], drawstyle="steps-mid", **style)


def _sizes(axis: Any, fleets: Sequence[Run], colours: Mapping[str, str], end: float) -> None:
    for fleet in fleets:
        times, sizes = ([pair[i] for pair in fleet["sizes"]] for i in (0, 1))
        axis.plot(
            [*times, end], [*sizes, sizes[-1]], drawstyle="steps-post", color=colours[fleet["label"]], linewidth=1.5
        )


def _head(figure: Any, report: Run, colours: Mapping[str, str], theme: Theme, height: float) -> None:
    figure.text(0.075, 1 - 0.3 / height, "Simulation", fontsize=15, fontweight="bold", color=theme.text, va="center")
    figure.text(0.075, 1 - 0.58 / height, describe(report), fontsize=8.5, color=theme.muted, va="center")
    line = importlib.import_module("matplotlib.lines").Line2D
    keys = [line([], [], color=c, label=name, linestyle=_dash(name), linewidth=2) for name, c in colours.items()]
    figure.legend(
        handles=keys,
        loc="upper left", bbox_to_anchor=(0.072, 1 - 0.72 / height), ncols=_LEGEND_COLUMNS, frameon=False, fontsize=9,
        labelcolor=theme.text, borderpad=0, handlelength=1.8, columnspacing=1.4,
    )  # fmt: skip
