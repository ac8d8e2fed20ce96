"""The picture: stacked panels over time, for one run or two. Needs matplotlib, which is loaded only here."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from morph_client.demo_load import PhaseSpan
from morph_client.errors import MissingDependency
from morph_client.palette import Theme, light
from morph_client.report import panels, svg
from morph_client.report.data import Run
from morph_client.report.panels import coloured, end_s

PANELS = ("load", "queue", "level", "kv", "precision")
"""The demo's panels; ``ttft`` is for replays."""

WIDE_IN, NARROW_IN = 10.0, 4.3
"""Width of a picture for a screen, and of one for a phone, where the wide one's letters would be too small."""

_PANEL_IN = 1.75
_HEAD_IN = 0.85
_BARE_HEAD_IN = 0.75
_LINE_IN = 0.2
_LEFT_IN, _RIGHT_IN = 0.75, 0.2
_HEADING_CHARS_PER_IN = 11
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
    width_in: float = WIDE_IN


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


def themed_svgs(picture: Picture) -> tuple[str, str]:
    """The picture as ``<svg>`` elements in a page's colours: for a screen, and for a phone. Raises
    :class:`MissingDependency`.
    """
    narrow = replace(picture, width_in=NARROW_IN)
    return svg.themed(lambda theme: _draw(picture, theme), "w-"), svg.themed(lambda theme: _draw(narrow, theme), "n-")


def _draw(picture: Picture, theme: Theme) -> Any:
    require_matplotlib()
    subtitle = _balanced_lines(picture.subtitle)
    head = _HEAD_IN + _LINE_IN * len(subtitle) if picture.title else _BARE_HEAD_IN
    wide = picture.width_in == WIDE_IN
    left_in = _LEFT_IN if wide else _LEFT_IN * 0.7
    left, right = left_in / picture.width_in, 1 - _RIGHT_IN / picture.width_in
    height = head + _PANEL_IN * len(picture.panels) + _FOOT_IN
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(picture.width_in, height), facecolor=theme.background
    )
    axes = figure.subplots(len(picture.panels), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(
        left=left, right=right, top=1 - head / height, bottom=_FOOT_IN / height, hspace=0.34 if wide else 0.5
    )
    end = end_s(picture)
    for axis, panel in zip(axes, picture.panels, strict=True):
        plain_axis(axis, theme)
        _shade(axis, picture.spans, theme)
        heading = panels.PANELS[panel](axis, picture, theme)
        heading = textwrap.fill(heading, round((picture.width_in - left_in) * _HEADING_CHARS_PER_IN))
        axis.set_title(heading, loc="left", fontsize=10.5, color=theme.text, pad=5, fontweight="bold")
        axis.set_xlim(0, end)
    _name_phases(axes[0], picture.spans, theme)
    axes[-1].set_xlabel("seconds since the start of the load", fontsize=10, color=theme.muted, labelpad=6)
    _head(figure, picture, theme, (left, right, height), subtitle)
    return figure


def style_axis(axis: Any, theme: Theme) -> None:
    """A horizontal grid, a bottom line, nothing else."""
    axis.set_facecolor("none")
    axis.grid(axis="y", color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=theme.muted, labelsize=9.5, length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.muted)


def plain_axis(axis: Any, theme: Theme) -> None:
    """`style_axis`, with few whole numbers on the left."""
    style_axis(axis, theme)
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


def _head(
    figure: Any, picture: Picture, theme: Theme, frame: tuple[float, float, float], subtitle: Sequence[str]
) -> None:
    """Title, subtitle and legend; ``frame``: left and right edge as shares of the width, and the height in inches."""
    left, right, height = frame
    title_y = 1 - 0.30 / height
    figure.text(left, title_y, picture.title, fontsize=15, fontweight="bold", color=theme.text, va="center")
    for i, line in enumerate(subtitle):
        y = 1 - (0.60 + _LINE_IN * i) / height
        figure.text(left, y, line, fontsize=10.5, color=theme.muted, va="center")
    if len(picture.runs) > 1:
        box = importlib.import_module("matplotlib.patches").Patch
        keys = [box(facecolor=colour, label=run.label) for run, colour in coloured(picture, theme)]
        figure.legend(
            handles=keys,
            loc="center right",
            bbox_to_anchor=(right + 0.006, title_y),
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
