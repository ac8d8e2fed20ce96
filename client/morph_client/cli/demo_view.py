"""The demo's live lines: phase, progress, level, KV cache, queue."""

from __future__ import annotations

import asyncio
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from morph_client.demo_load import PhaseSpan
from morph_client.demo_run import Watch
from morph_client.palette import ACCENT, WARN
from morph_client.state import ServerState

_BAR = 36


class LoadView:
    """Shows a :class:`Watch` while the load runs; one line per phase where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._phase: str | None = None

    def show(self, watch: Watch) -> None:
        """Draws the newest state."""
        if not self._console.is_terminal:
            self._say_phase(watch)
        elif self._live is None:
            # Not earlier: the sample answer is printed where the live lines will be.
            self._live = Live(_lines(watch), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        else:
            self._live.update(_lines(watch), refresh=True)

    def __enter__(self) -> LoadView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _say_phase(self, watch: Watch) -> None:
        name = _phase(watch, _elapsed_s(watch))
        if name != self._phase:
            self._phase = name
            self._console.print(f"{_elapsed_s(watch):5.0f} s  {name}: {_counts(watch)}")


def _lines(watch: Watch) -> Table:
    elapsed = _elapsed_s(watch)
    state = watch.samples.latest
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", width=9, no_wrap=True)
    grid.add_column(width=_BAR, no_wrap=True)
    grid.add_column(no_wrap=True)
    share = min(1.0, elapsed / watch.load.seconds)
    grid.add_row("phase", _time_bar(watch, share), Text(_phase(watch, elapsed), "bold"))
    done = watch.counts.done / max(1, watch.counts.total)
    grid.add_row("answers", _bar(done, ACCENT), Text(_counts(watch)))
    if state is not None:
        _add_state(grid, state)
    return grid


def _add_state(grid: Table, state: ServerState) -> None:
    most = max(1, state.level_max or 1)
    level = state.level or 0
    grid.add_row("level", _bar(level / most, WARN), Text(f"{level} of {most} layers quantized"))
    if state.kv_capacity:
        used = state.kv_used or 0.0
        more = state.kv_capacity - (state.kv_base or state.kv_capacity)
        words = Text(f"{used:.0f} of {state.kv_capacity:.0f} blocks")
        if more > 0:
            words.append(f" (+{more:.0f})", WARN)
        grid.add_row("KV cache", _bar(used / state.kv_capacity, ACCENT), words)
    busy = "bold" if state.queued else "dim"
    grid.add_row("queue", Text(("▪" * round(state.queued))[:_BAR], WARN), Text(f"{state.queued:.0f} waiting", busy))


def _time_bar(watch: Watch, share: float) -> Text:
    """The phases side by side, the burst in colour; what is over is solid."""
    text = Text()
    for i in range(_BAR):
        at = (i + 0.5) / _BAR * watch.load.seconds
        busy = any(span.busy and span.start_s <= at < span.end_s for span in watch.load.spans)
        past = (i + 0.5) / _BAR <= share
        text.append("█" if past else "░", WARN if busy else ACCENT if past else "dim")
    return text


def _bar(share: float, style: str) -> Text:
    filled = round(max(0.0, min(1.0, share)) * _BAR)
    return Text("█" * filled, style).append("░" * (_BAR - filled), "dim")


def _counts(watch: Watch) -> str:
    counts = watch.counts
    text = f"{counts.done} of {counts.total}"
    if counts.sent > counts.done:
        text += f", {counts.sent - counts.done} in flight"
    return f"{text}, {counts.errors} errors" if counts.errors else text


def _phase(watch: Watch, elapsed: float) -> str:
    if watch.load_over:
        return "coming back to full precision"
    current: PhaseSpan | None = next((s for s in watch.load.spans if s.start_s <= elapsed < s.end_s), None)
    return current.name if current is not None else "waiting for the last answers"


def _elapsed_s(watch: Watch) -> float:
    return 0.0 if watch.started_at is None else asyncio.get_running_loop().time() - watch.started_at
