"""A replay under a progress bar."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from morph_client.replay_run import Replayed, ReplayWatch

_REDRAW_S = 0.25


async def under_a_bar(replay: Awaitable[Replayed], watch: ReplayWatch, console: Console, what: str) -> Replayed:
    """Awaits the replay and shows how far it is, if the console is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}", style="dim"),
        TimeElapsedColumn(),
    )
    running = asyncio.ensure_future(replay)
    try:
        with Progress(
            *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task(what, total=None, now="")
            while not running.done():
                await asyncio.wait([running], timeout=_REDRAW_S)
                _redraw(bar, task, watch)
        return running.result()
    finally:
        running.cancel()


def _redraw(bar: Progress, task: TaskID, watch: ReplayWatch) -> None:
    counts, state = watch.counts, watch.samples.latest
    now = f"{counts.sent - counts.done} in flight"
    if state is not None and state.level is not None:
        now += f" · level {state.level} · queue {state.queued:.0f}"
    if counts.errors:
        now += f" · {counts.errors} errors"
    bar.update(task, completed=counts.done, total=counts.total, now=now, refresh=True)
