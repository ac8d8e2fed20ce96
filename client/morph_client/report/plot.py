"""The picture: stacked panels over time, for one run or two. Needs matplotlib, which is loaded only here."""

from __future__ import annotations

import importlib
import io
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from morph_client.demo_load import PhaseSpan
from morph_client.errors import MissingDependency
from morph_client.palette import Theme, light
from morph_client.report.data import Run

PANELS = ("load", "queue", "level", "kv")
"""The demo's panels; ``ttft`` is a fifth, for replays."""

_WIDTH_IN = 10.0
_PANEL_IN = 1.75
_HEAD_IN = 0.85
_BARE_HEAD_IN = 0.75
_LINE_IN = 0.2
_LEFT, _RIGHT = 0.075, 0.98
_SUBTITLE_CHARS = 118
_FOOT_IN = 0.62


@dataclass(frozen=True)
class Picture:
    """What to draw."""

    title: str
    subtitle: str
    runs: Sequence[Run]
    """At most two; the last is the one in colour."""
    spans: Sequence[PhaseSpan] = ()
    panels: Sequence[str] = PANELS


def require_matplotlib() -> None:
    """Raises :class:`MissingDependency` unless matplotlib is installed."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        raise MissingDependency(
            "a picture needs matplotlib, which is not installed: pip install 'morphserve[plots]'"
        ) from None


def write_png(picture: Picture, path: Path, theme: Theme | None = None) -> None:
    """Draws a PNG. Raises :class:`MissingDependency`, or ``OSError`` if the file cannot be written."""
    figure = _draw(picture, theme or light())
    figure.savefig(path, dpi=160, facecolor=figure.get_facecolor())


def themed_svg(picture: Picture) -> str:
    """An ``<svg>`` element whose colours are the CSS variables ``--background``, ``--text`` and so on.

    It refers to nothing outside itself. Raises :class:`MissingDependency`.
    """
    stand_ins = {item.name: f"#0{i:x}fe{i:x}0" for i, item in enumerate(fields(Theme), 1)}
    figure = _draw(picture, Theme(**stand_ins))
    # Embeds letters as outlines: they look the same wherever the page is opened.
    with importlib.import_module("matplotlib").rc_context({"svg.fonttype": "path", "svg.hashsalt": "morph"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor=figure.get_facecolor())
    svg = buffer.getvalue()
    for name, colour in stand_ins.items():
        svg = svg.replace(colour, f"var(--{name})")
    return _self_contained(svg)


def _self_contained(svg: str) -> str:
    """Leaves out what an HTML page does not need: the XML head, namespaces, and the metadata with its addresses."""
    svg = svg[svg.index("<svg") :]
    start, end = svg.find("<metadata>"), svg.find("</metadata>")
    if start >= 0:
        svg = svg[:start] + svg[end + len("</metadata>") :]
    head_end = svg.index(">")
    view_box = svg[svg.index('viewBox="') : head_end].split('"')[1]
    return f'<svg viewBox="{view_box}" role="img">{svg[head_end + 1 :]}'.replace("xlink:href=", "href=")


def _draw(picture: Picture, theme: Theme) -> Any:
    require_matplotlib()
    subtitle = _balanced_lines(picture.subtitle)
    head = _HEAD_IN + _LINE_IN * len(subtitle) if picture.title else _BARE_HEAD_IN
    height = head + _PANEL_IN * len(picture.panels) + _FOOT_IN
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(_WIDTH_IN, height), facecolor=theme.background
    )
    axes = figure.subplots(len(picture.panels), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=_LEFT, right=_RIGHT, top=1 - head / height, bottom=_FOOT_IN / height, hspace=0.34)
    end = _end_s(picture)
    draw: dict[str, Callable[[Any, Picture, Theme], str]] = {
        "load": _load,
        "queue": _queue,
        "level": _level,
        "kv": _kv,
        "ttft": _ttft,
    }
    for axis, panel in zip(axes, picture.panels, strict=True):
        _plain_axis(axis, theme)
        _shade(axis, picture.spans, theme)
        heading = draw[panel](axis, picture, theme)
        axis.set_title(heading, loc="left", fontsize=10.5, color=theme.text, pad=5, fontweight="bold")
        axis.set_xlim(0, end)
    _name_phases(axes[0], picture.spans, theme)
    axes[-1].set_xlabel("seconds since the start of the load", fontsize=10, color=theme.muted, labelpad=6)
    _head(figure, picture, theme, height, subtitle)
    return figure


def _plain_axis(axis: Any, theme: Theme) -> None:
    axis.set_facecolor("none")
    axis.grid(axis="y", color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=theme.muted, labelsize=9.5, length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.muted)
    axis.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(nbins=4, integer=True))


def _shade(axis: Any, spans: Sequence[PhaseSpan], theme: Theme) -> None:
    for span in spans:
        if span.busy:
            axis.axvspan(span.start_s, span.end_s, color=theme.burst, linewidth=0, zorder=0)


def _name_phases(axis: Any, spans: Sequence[PhaseSpan], theme: Theme) -> None:
    for span in spans:
        middle = (span.start_s + span.end_s) / 2
        axis.text(
            middle,
            0.95,
            span.name,
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=9.5,
            color=theme.muted,
            style="italic",
        )


def _head(figure: Any, picture: Picture, theme: Theme, height: float, subtitle: Sequence[str]) -> None:
    title_y = 1 - 0.30 / height
    figure.text(_LEFT, title_y, picture.title, fontsize=15, fontweight="bold", color=theme.text, va="center")
    for i, line in enumerate(subtitle):
        y = 1 - (0.60 + _LINE_IN * i) / height
        figure.text(_LEFT, y, line, fontsize=10.5, color=theme.muted, va="center")
    if len(picture.runs) > 1:
        box = importlib.import_module("matplotlib.patches").Patch
        keys = [box(facecolor=colour, label=run.label) for run, colour in _coloured(picture, theme)]
        figure.legend(
            handles=keys,
            loc="center right",
            bbox_to_anchor=(_RIGHT + 0.006, title_y),
            ncols=len(keys),
            frameon=False,
            fontsize=10.5,
            labelcolor=theme.text,
            handlelength=1.1,
            handleheight=0.35,
            handletextpad=0.5,
            columnspacing=1.6,
            borderpad=0,
        )


def _balanced_lines(text: str) -> list[str]:
    lines = textwrap.wrap(text, _SUBTITLE_CHARS)
    # Wrapped a second time, so that no line is left with a single word.
    return textwrap.wrap(text, len(text) // len(lines) + 12) if len(lines) > 1 else lines


def _coloured(picture: Picture, theme: Theme) -> Sequence[tuple[Run, str]]:
    colours = (theme.on,) if len(picture.runs) == 1 else (theme.off, theme.on)
    return list(zip(picture.runs, colours, strict=True))


def _load(axis: Any, picture: Picture, theme: Theme) -> str:
    counts = Counter(math.floor(r.due_s) for r in picture.runs[-1].records)
    seconds = range(math.ceil(_end_s(picture)) + 1)
    axis.fill_between(seconds, [counts[s] for s in seconds], step="post", color=theme.load, linewidth=0)
    axis.set_ylim(0, max([*counts.values(), 1]) * 1.35)
    return "Load: requests that arrive, per second"


def _queue(axis: Any, picture: Picture, theme: Theme) -> str:
    top = 1.0
    for run, colour in _coloured(picture, theme):
        times, values = [s.at_s for s in run.states], [s.state.queued for s in run.states]
        axis.plot(times, values, color=colour, linewidth=1.8, drawstyle="steps-post")
        axis.fill_between(times, values, step="post", color=colour, alpha=0.12, linewidth=0)
        top = max([top, *values])
    axis.set_ylim(0, top * 1.12)
    return "Queue: requests that wait"


def _level(axis: Any, picture: Picture, theme: Theme) -> str:
    greatest = max((s.state.level_max or 0 for run in picture.runs for s in run.states), default=0)
    for run, colour in _coloured(picture, theme):
        known = [(s.at_s, s.state.level) for s in run.states if s.state.level is not None]
        times, values = [at for at, _ in known], [level for _, level in known]
        axis.plot(times, values, color=colour, linewidth=1.8, drawstyle="steps-post")
        axis.fill_between(times, values, step="post", color=colour, alpha=0.12, linewidth=0)
    axis.set_ylim(0, max(greatest, 1) * 1.08)
    return f"Level: quantized layers, of {greatest}" if greatest else "Level: quantized layers"


def _kv(axis: Any, picture: Picture, theme: Theme) -> str:
    top, tokens = 1.0, None
    for run, colour in _coloured(picture, theme):
        known = [s for s in run.states if s.state.kv_capacity is not None]
        times = [s.at_s for s in known]
        capacity = [s.state.kv_capacity or 0.0 for s in known]
        used = [s.state.kv_used or 0.0 for s in known]
        axis.plot(times, capacity, color=colour, linewidth=1.8, drawstyle="steps-post")
        axis.fill_between(times, used, step="post", color=colour, alpha=0.22, linewidth=0)
        top = max([top, *capacity, *used])
        tokens = next((s.state.kv_block_tokens for s in known if s.state.kv_block_tokens), tokens)
    axis.set_ylim(0, top * 1.12)
    unit = f"blocks of {tokens} tokens" if tokens else "blocks"
    return f"KV cache: capacity (line) and use (filled), {unit}"


def _ttft(axis: Any, picture: Picture, theme: Theme) -> str:
    top = 0.0
    for run, colour in _coloured(picture, theme):
        points = [(r.due_s, r.ttft_s) for r in run.records if r.ttft_s is not None]
        times, values = [at for at, _ in points], [ttft for _, ttft in points]
        axis.scatter(times, values, s=12, color=colour, alpha=0.65, linewidths=0)
        top = max([top, *values])
    axis.set_ylim(0, (top or 1) * 1.12)
    axis.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(nbins=4))
    return "Time to first token, by arrival, in seconds"


def _end_s(picture: Picture) -> float:
    ends = [1.0, *(span.end_s for span in picture.spans)]
    for run in picture.runs:
        ends.extend(s.at_s for s in run.states[-1:])
        ends.extend(r.last_s or r.due_s for r in run.records)
    return max(ends)
