"""The panels of a picture over time: each draws one thing for all runs and returns its heading."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from morph_client.palette import RUNG_STYLE, RUNGS, Theme
from morph_client.report.data import Run

if TYPE_CHECKING:
    from morph_client.report.plot import Picture


def coloured(picture: Picture, theme: Theme) -> Sequence[tuple[Run, str]]:
    """The runs with their colours."""
    colours = (theme.on,) if len(picture.runs) == 1 else (theme.off, theme.on)
    return list(zip(picture.runs, colours, strict=True))


def _load(axis: Any, picture: Picture, theme: Theme) -> str:
    counts = Counter(math.floor(r.due_s) for r in picture.runs[-1].records)
    seconds = range(math.ceil(end_s(picture)) + 1)
    axis.fill_between(seconds, [counts[s] for s in seconds], step="post", color=theme.load, linewidth=0)
    axis.set_ylim(0, max([*counts.values(), 1]) * 1.35)
    return "Load: requests that arrive, per second"


def _queue(axis: Any, picture: Picture, theme: Theme) -> str:
    top = 1.0
    for run, colour in coloured(picture, theme):
        times, values = [s.at_s for s in run.states], [s.state.queued for s in run.states]
        axis.plot(times, values, color=colour, linewidth=1.8, drawstyle="steps-post")
        axis.fill_between(times, values, step="post", color=colour, alpha=0.12, linewidth=0)
        top = max([top, *values])
    axis.set_ylim(0, top * 1.12)
    return "Queue: requests that wait"


def _level(axis: Any, picture: Picture, theme: Theme) -> str:
    greatest = max((s.state.level_max or 0 for run in picture.runs for s in run.states), default=0)
    for run, colour in coloured(picture, theme):
        known = [(s.at_s, s.state.level) for s in run.states if s.state.level is not None]
        times, values = [at for at, _ in known], [level for _, level in known]
        axis.plot(times, values, color=colour, linewidth=1.8, drawstyle="steps-post")
        axis.fill_between(times, values, step="post", color=colour, alpha=0.12, linewidth=0)
    axis.set_ylim(0, max(greatest, 1) * 1.08)
    return f"Level: quantized layers, of {greatest}" if greatest else "Level: quantized layers"


def _kv(axis: Any, picture: Picture, theme: Theme) -> str:
    top, tokens = 1.0, None
    for run, colour in coloured(picture, theme):
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
    for run, colour in coloured(picture, theme):
        points = [(r.due_s, r.ttft_s) for r in run.records if r.ttft_s is not None]
        times, values = [at for at, _ in points], [ttft for _, ttft in points]
        axis.scatter(times, values, s=12, color=colour, alpha=0.65, linewidths=0)
        top = max([top, *values])
    axis.set_ylim(0, (top or 1) * 1.12)
    axis.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(nbins=4))
    return "Time to first token, by arrival, in seconds"


def _precision(axis: Any, picture: Picture, theme: Theme) -> str:
    bins = {round(b.at_s): b.rungs for b in picture.runs[-1].precision}
    seconds = range(math.ceil(end_s(picture)) + 1)
    below = [0.0] * len(seconds)
    for rung in RUNGS:
        top = [low + (getattr(bins[s], rung) if s in bins else 0.0) for low, s in zip(below, seconds, strict=True)]
        if top != below:
            axis.fill_between(seconds, below, top, step="post", color=RUNG_STYLE[rung], linewidth=0, label=rung)
        below = top
    axis.set_ylim(0, max([*below, 1.0]) * 1.25)
    if bins:
        axis.legend(
            loc="upper right", ncols=3, frameon=False, fontsize=9, labelcolor=theme.text, borderpad=0, handlelength=1.0,
            handleheight=0.8,
        )  # fmt: skip
    of = f", {picture.runs[-1].label}" if len(picture.runs) > 1 else ""
    return f"Output tokens per second by precision{of}"


PANELS: dict[str, Callable[[Any, Picture, Theme], str]] = {
    "load": _load,
    "ttft": _ttft,
    "queue": _queue,
    "level": _level,
    "kv": _kv,
    "precision": _precision,
}


def end_s(picture: Picture) -> float:
    """The last moment of any run."""
    ends = [1.0, *(span.end_s for span in picture.spans)]
    for run in picture.runs:
        ends.extend(s.at_s for s in run.states[-1:])
        ends.extend(r.last_s or r.due_s for r in run.records)
    return max(ends)
