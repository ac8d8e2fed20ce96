"""Draws one page of ``morph top``. Fits 80 columns; readable without colour."""

from __future__ import annotations

from urllib.parse import urlsplit

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from morph_client.cli.top_history import History, Quantiles
from morph_client.palette import ACCENT, BAD, RUNG_GLYPH, RUNG_LETTER, RUNG_OF_BITS, RUNG_STYLE, RUNGS, WARN
from morph_client.report.table import NOTHING, percent, seconds
from morph_client.state import ServerState

_WIDEST = 100
_LABEL = 10
_NOTES = 56
"""Columns for the words of a line, from which on there is room for what can be left out."""


def frame(history: History, metrics_url: str, console: Console) -> RenderableType:
    """The page for the newest state of ``history``."""
    state = history.now
    outer = min(console.width, _WIDEST)
    width = outer - 4 - _LABEL - 2
    glyphs = RUNG_GLYPH if console.encoding.lower().startswith("utf") else RUNG_LETTER
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", width=_LABEL, no_wrap=True)
    grid.add_column(width=width)
    for name, what in _rows(history, state, width, glyphs):
        grid.add_row(name, what)
    body: list[RenderableType] = [grid]
    if history.problem is not None:
        body.insert(0, Text(history.problem, style=f"bold {BAD}"))
    title = Text.assemble(("morph ", "bold"), urlsplit(metrics_url).netloc, " · mode ", (_mode(state), "bold"))
    if state.ttft_slo_s is not None:
        title.append(f" · target {state.ttft_slo_s:g} s")
    return Panel(
        Group(*body), title=title, title_align="left", subtitle=_engine(state), subtitle_align="right",
        box=box.ROUNDED, border_style="dim", width=outer,
    )  # fmt: skip


def _rows(history: History, state: ServerState, width: int, glyphs: dict[str, str]) -> list[tuple[str, Text]]:
    since = "since the start" if history.window_s is None else f"last {history.window_s:.0f} s"
    return [
        ("Level", _level(state)),
        ("Layers", _layers(state, width, glyphs)),
        ("", _legend(state, glyphs)),
        ("", Text()),
        (_kv_label(state), _kv_bar(state, width, glyphs is RUNG_GLYPH)),
        ("", _kv_words(state)),
        ("Memory", _memory(state)),
        ("", Text()),
        ("Queue", _queue(state)),
        ("TTFT", _times(history.ttft, f"{since}, without the queue", width)),
        ("TPOT", _times(history.tpot, since, width)),
        ("Tokens", _tokens(history)),
        ("", Text()),
        ("Shifts", _shifts(state, width)),
        ("Decisions", _decisions(history, width)),
    ]


def _mode(state: ServerState) -> str:
    mode = state.mode or "?"
    return mode if state.cap is None or state.cap >= 1 else f"{mode}, cap {state.cap:g}"


def _engine(state: ServerState) -> Text:
    if state.engine_up is None:
        return Text()
    return Text("engine up", style="dim") if state.engine_up else Text("engine down", style=f"bold {BAD}")


def _level(state: ServerState) -> Text:
    level, most = state.level, state.level_max
    if level is None:
        return Text(NOTHING)
    text = Text.assemble((str(level), f"bold {WARN if level else ACCENT}"), f" of {NOTHING if most is None else most}")
    if level == 0:
        text.append("  full precision", "dim")
    return text.append("  the SLOs cannot be met", f"bold {BAD}") if state.slo_feasible is False else text


def _layers(state: ServerState, width: int, glyphs: dict[str, str]) -> Text:
    count = len(state.layer_bits)
    if not count:
        return Text(NOTHING)
    cell = min(4, width // count - 1)
    text = Text(overflow="fold")
    for bits in state.layer_bits:
        rung = RUNG_OF_BITS.get(bits)
        glyph, style = (glyphs[rung], RUNG_STYLE[rung]) if rung else ("?", "")
        text.append(glyph * max(1, cell), style)
        if cell >= 1:
            text.append(" ")
    text.rstrip()
    return text


def _legend(state: ServerState, glyphs: dict[str, str]) -> Text:
    text = Text()
    for rung in RUNGS:
        count = sum(RUNG_OF_BITS.get(bits) == rung for bits in state.layer_bits)
        text.append(glyphs[rung], RUNG_STYLE[rung]).append(f" {rung} {count}   ", "" if count else "dim")
    return text


def _kv_label(state: ServerState) -> str:
    return f"KV {state.kv_dtype}" if state.kv_dtype in ("fp8", "int8") else "KV cache"


def _kv_bar(state: ServerState, width: int, unicode: bool) -> Text:
    capacity, used, base = state.kv_capacity, state.kv_used or 0.0, state.kv_base or 0.0
    if not capacity:
        return Text(NOTHING)
    full, free, mark = ("█", "░", "┃") if unicode else ("#", ".", "|")
    scale = width / max(capacity, base)
    filled, whole, at = round(used * scale), round(capacity * scale), round(base * scale)
    text = Text()
    for i in range(max(whole, at)):
        # The mark shows where the cache would end at level 0: what lies right of it was won by morphing.
        if i == at - 1 and capacity > base:
            text.append(mark, "bold")
        elif i < filled:
            text.append(full, ACCENT if i < at else WARN)
        else:
            text.append(free if i < whole else " ", "dim")
    return text


def _kv_words(state: ServerState) -> Text:
    if not state.kv_capacity:
        return Text()
    used = state.kv_used or 0.0
    text = Text(f"{used:.0f} of {state.kv_capacity:.0f} blocks used ({used / state.kv_capacity * 100:.0f} %)")
    if state.kv_base is not None:
        more = state.kv_capacity - state.kv_base
        text.append(
            f", {more:.0f} of them won by morphing" if more > 0 else ", as at level 0", WARN if more > 0 else "dim"
        )
    return text


def _memory(state: ServerState) -> Text:
    names = {"weights": "weights", "kv": "KV", "static": "static", "free": "free"}
    held = state.memory_bytes
    parts = [f"{word} {_mib(held[kind])}" for kind, word in names.items() if kind in held]
    if not parts:
        return Text(NOTHING)
    text = Text(" · ".join(parts))
    if "budget" in held:
        # What the arena does not hold is set aside for the work of a step.
        rest = held["budget"] - sum(held[kind] for kind in names if kind in held)
        text.append(f" · workspace {_mib(max(0.0, rest))}", "dim").append(f" of {_mib(held['budget'])}")
    return text.append(" MiB")


def _queue(state: ServerState) -> Text:
    busy = f"bold {WARN}" if state.pending else ""
    return Text.assemble(
        (f"{state.pending:.0f} in Triton's queue", busy),
        f" · {state.waiting:.0f} in line · {state.running:.0f} running",
    )


def _times(quantiles: Quantiles, note: str, width: int) -> Text:
    note = note if width >= _NOTES else note.partition(",")[0]
    if quantiles.p50 is None:
        return Text.assemble(NOTHING, (f"   {note}", "dim"))
    return Text.assemble(f"p50 {seconds(quantiles.p50):>8}   p95 {seconds(quantiles.p95):>8}", (f"   {note}", "dim"))


def _tokens(history: History) -> Text:
    by_rung = history.rung_tokens
    total = sum(by_rung.values())
    rate = history.tokens_per_s
    text = Text(f"{history.now.generated_tokens:.0f} in all" if rate is None else f"{rate:.0f} per second")
    if total:
        for rung in RUNGS:
            share = by_rung.get(rung, 0.0) / total
            text.append(f" · {rung} ").append(percent(share), RUNG_STYLE[rung] if share else "dim")
    return text


def _shifts(state: ServerState, width: int) -> Text:
    down, up = state.shifts.get("down", 0.0), state.shifts.get("up", 0.0)
    text = Text(f"{down:.0f} down · {up:.0f} up · {state.preemptions:.0f} preemptions")
    return text.append("   since the start", "dim") if width >= _NOTES else text


def _decisions(history: History, width: int) -> Text:
    text = Text()
    room = 28 if width >= _NOTES else 16
    for decision in history.decisions():
        if text.plain:
            text.append("\n")
        style = WARN if decision.action == "down" else ACCENT if decision.action == "up" else "dim"
        text.append(f"{decision.action:<5}", style).append(f"{decision.reason:<{room}} × {decision.count}")
        if history.window_s is not None:
            text.append(f"   {history.age_s(decision):.0f} s ago", "dim")
    return (
        text if text.plain else Text("none yet" if history.window_s is None else "none while this page is open", "dim")
    )


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f}"
