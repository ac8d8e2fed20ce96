"""The picture of a comparison: what each configuration costs and brings, and how the burst went."""

from __future__ import annotations

import importlib
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morph_client.palette import FURTHER, RUNG_STYLE, RUNGS, Theme, light
from morph_client.report import svg
from morph_client.report.plot import NARROW_IN, WIDE_IN, plain_axis, require_matplotlib

_PANEL_IN, _FOOT_IN, _TITLE_IN, _ROW_IN = 1.75, 0.62, 0.5, 0.34
_LABEL_CHARS = 18
_TITLE_X = 0.02
"""Where titles begin, as a share of the width."""

_Panel = Callable[[Any, Mapping[str, Any], Theme], str]


def write_png(result: Mapping[str, Any], title: str, path: Path) -> None:
    """Raises :class:`MissingDependency`, or ``OSError`` if the file cannot be written."""
    figure = _draw(result, title, WIDE_IN, light())
    figure.savefig(path, dpi=150, facecolor=figure.get_facecolor())


def themed_svgs(result: Mapping[str, Any]) -> tuple[str, str]:
    """As elements of a page: for a screen, and for a phone."""
    wide = svg.themed(lambda theme: _draw(result, "", WIDE_IN, theme), "cw-")
    return wide, svg.themed(lambda theme: _draw(result, "", NARROW_IN, theme), "cn-")


def _draw(result: Mapping[str, Any], title: str, width_in: float, theme: Theme) -> Any:
    require_matplotlib()
    bars_in = _ROW_IN * len(result["configurations"]) + 0.3
    bars: list[tuple[float, _Panel]] = [(bars_in, _ttft_bars)]
    if any(c["figures"]["perplexity"] for c in result["configurations"]):
        bars.append((bars_in, _perplexity_bars))
    over_time: list[tuple[float, _Panel]] = [(_PANEL_IN, p) for p in (_ttft, _queue, _level, _kv, _precision)]
    panels = bars + over_time
    gap_in = 0.62 if width_in == WIDE_IN else 0.8
    top_in = _TITLE_IN + (0.55 if title else 0.0)
    height = top_in + sum(size + gap_in for size, _ in panels) + _FOOT_IN - gap_in
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width_in, height), facecolor=theme.background)
    if title:
        figure.text(_TITLE_X, 1 - 0.35 / height, title, fontsize=15, fontweight="bold", color=theme.text, va="center")
    end, at_in = _end_s(result), top_in
    for i, (size, panel) in enumerate(panels):
        timed = i >= len(bars)
        left_in = (0.55 if timed else 1.55) if width_in == NARROW_IN else (0.75 if timed else 1.85)
        box = (left_in / width_in, 1 - (at_in + size) / height, 1 - (left_in + 0.2) / width_in, size / height)
        axis = figure.add_axes(box)
        plain_axis(axis, theme)
        heading = panel(axis, result, theme)
        chars = round((width_in - 0.7) * 11)
        axis.set_title(
            textwrap.fill(heading, chars), loc="left", fontsize=10.5, color=theme.text, pad=5, fontweight="bold",
            x=0 if timed else (_TITLE_X * width_in - left_in) / (width_in - left_in - 0.2),
        )  # fmt: skip
        if timed:
            axis.set_xlim(0, end)
            _shade(axis, result, theme)
        at_in += size + gap_in
    axis.set_xlabel("seconds since the start of the trace", fontsize=10, color=theme.muted, labelpad=6)
    return figure


def _colour(result: Mapping[str, Any], column: Mapping[str, Any], theme: Theme) -> str:
    """Static configurations have their rung's colour, those that morph one each."""
    if not column["morphs"]:
        return RUNG_STYLE[column["name"]]
    colours = (theme.on, *FURTHER)
    names = [c["name"] for c in result["configurations"] if c["morphs"]]
    return colours[names.index(column["name"]) % len(colours)]


def _bars(axis: Any, result: Mapping[str, Any], theme: Theme, figure: str, from_zero: bool, text: str) -> None:
    """One line per configuration: a bar to the median, a dot for each repeat."""
    columns: Sequence[Mapping[str, Any]] = result["configurations"]
    known = [c["figures"][figure] for c in columns if c["figures"][figure]]
    most, least = max((f["max"] for f in known), default=1.0), min((f["min"] for f in known), default=0.0)
    start = 0.0 if from_zero else least - 0.25 * max(most - least, 1e-9)
    for place, column in enumerate(columns):
        found = column["figures"][figure]
        if found is None:
            continue
        colour = _colour(result, column, theme)
        axis.barh(place, found["median"] - start, left=start, height=0.62, color=colour, alpha=0.85, linewidth=0)
        dots = [run["figures"][figure] for run in column["runs"]]
        axis.scatter(dots, [place] * len(dots), s=16, color=theme.text, zorder=3, linewidths=0)
        # In a column of their own: beside a dot the figure would seem to be the dot's.
        axis.text(
            1, place, text.format(found["median"]), transform=axis.get_yaxis_transform(), ha="right", va="center",
            fontsize=9.5, color=theme.text,
        )  # fmt: skip
    axis.set_yticks(range(len(columns)), [textwrap.fill(c["label"], _LABEL_CHARS) for c in columns])
    axis.tick_params(axis="y", labelcolor=theme.text)
    axis.invert_yaxis()
    axis.set_xlim(start, start + (most - start) * 1.3)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color=theme.grid, linewidth=0.8)
    axis.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(nbins=5))


def _ttft_bars(axis: Any, result: Mapping[str, Any], theme: Theme) -> str:
    _bars(axis, result, theme, "ttft_p95_s", True, "{:.2f} s")
    return "Time to first token, p95, seconds (bar and figure: median; dots: repeats)"


def _perplexity_bars(axis: Any, result: Mapping[str, Any], theme: Theme) -> str:
    _bars(axis, result, theme, "perplexity", False, "{:.3f}")
    return "Perplexity of outputs (axis does not begin at 0)"


def _shown(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configurations that the panels over time show: full precision, static W4, and those that morph."""
    return [c for c in result["configurations"] if c["name"] in ("full", "w4") or c["morphs"]]


def middle_run(column: Mapping[str, Any]) -> Mapping[str, Any]:
    """The repeat with the median p95, so that a picture shows neither the best nor the worst."""
    runs = sorted(column["runs"], key=lambda run: run["figures"]["ttft_p95_s"] or math.inf)
    found: Mapping[str, Any] = runs[(len(runs) - 1) // 2]["series"]
    return found


def _morphing(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration whose inside is shown: the first that morphs, else the last."""
    return next((c for c in result["configurations"] if c["morphs"]), result["configurations"][-1])


def _ttft(axis: Any, result: Mapping[str, Any], theme: Theme) -> str:
    for column in _shown(result):
        requests = middle_run(column)["requests"]
        axis.scatter(
            requests["due_s"], requests["ttft_s"], s=11, color=_colour(result, column, theme), alpha=0.75, linewidths=0,
            label=column["label"],
        )  # fmt: skip
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(nbins=4))
    _legend(axis, theme)
    return "Time to first token, by arrival, seconds"


def _queue(axis: Any, result: Mapping[str, Any], theme: Theme) -> str:
    for column in _shown(result):
        state = middle_run(column)["state"]
        axis.plot(
            state["at_s"], state["queued"], color=_colour(result, column, theme), linewidth=1.6, drawstyle="steps-post"
        )
    axis.set_ylim(bottom=0)
    return "Queue: requests that wait"


def _level(axis: Any, result: Mapping[str, Any], theme: Theme) -> str:
    column = _morphing(result)
    state = middle_run(column)["state"]
    known = [(at, level) for at, level in zip(state["at_s"], state["level"], strict=True) if level is not None]
    times, levels = [at for at, _ in known], [level for _, level in known]
    axis.plot(times, levels, color=_colour(result, column, theme), linewidth=1.8, drawstyle="steps-post")
    axis.fill_between(times, levels, step="post", color=_colour(result, column, theme), alpha=0.12, linewidth=0)
    axis.set_ylim(0, max(state["level_max"], 1) * 1.08)
    return f"{column['label'].capitalize()}: level, of {state['level_max']}"


def _kv(axis: Any, result: Mapping[str, Any], theme: Theme) -> str:
    column = _morphing(result)
    state = middle_run(column)["state"]
    colour = _colour(result, column, theme)
    capacity = [math.nan if v is None else v for v in state["kv_capacity"]]
    used = [v or 0.0 for v in state["kv_used"]]
    axis.plot(state["at_s"], capacity, color=colour, linewidth=1.8, drawstyle="steps-post")
    axis.fill_between(state["at_s"], used, step="post", color=colour, alpha=0.22, linewidth=0)
    axis.set_ylim(bottom=0)
    return f"{column['label'].capitalize()}: KV blocks, capacity (line) and use (filled)"


def _precision(axis: Any, result: Mapping[str, Any], theme: Theme) -> str:
    column = _morphing(result)
    bins = middle_run(column)["precision"]
    seconds = list(range(math.ceil(_end_s(result)) + 1))
    below = [0.0] * len(seconds)
    for rung in RUNGS:
        by_second = dict(zip(map(round, bins["at_s"]), bins[rung], strict=True))
        top = [low + by_second.get(s, 0.0) for low, s in zip(below, seconds, strict=True)]
        if top != below:
            axis.fill_between(seconds, below, top, step="post", color=RUNG_STYLE[rung], linewidth=0, label=rung)
        below = top
    axis.set_ylim(0, max([*below, 1.0]) * 1.25)
    _legend(axis, theme)
    return f"{column['label'].capitalize()}: output tokens per second, by precision"


def _legend(axis: Any, theme: Theme) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(
            loc="upper right", frameon=False, fontsize=9, labelcolor=theme.text, borderpad=0, handlelength=1.0,
            handleheight=0.8, labelspacing=0.25,
        )  # fmt: skip


def _shade(axis: Any, result: Mapping[str, Any], theme: Theme) -> None:
    if result["burst_s"]:
        axis.axvspan(*result["burst_s"], color=theme.burst, linewidth=0, zorder=0)


def _end_s(result: Mapping[str, Any]) -> float:
    ends = [1.0]
    for column in result["configurations"]:
        series = middle_run(column)
        ends += series["state"]["at_s"][-1:] + series["requests"]["due_s"][-1:]
    return max(ends)
