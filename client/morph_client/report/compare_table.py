"""The table of a comparison, and the sentence above it. Values are medians over the repeats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from morph_client.report.table import NOTHING, Row, percent, seconds

_Shown = Callable[[float], str]


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _times(value: float) -> str:
    return f"{value:.2f} ×"


def _signed(value: float) -> str:
    return f"{value * 100:+.1f} %"


def _share(value: float) -> str:
    return f"{value * 100:.0f} %"


def _fixed(digits: int) -> _Shown:
    return lambda value: f"{value:.{digits}f}"


_NAME_WIDTH, _VALUE_WIDTH = 24, 13
_LINES: tuple[tuple[str, str, _Shown, bool, bool], ...] = (
    # name (at most _NAME_WIDTH, so that it does not fold), figure, how it is shown, whether a group begins, whether
    # least and most of the repeats follow
    ("requests", "requests", _whole, False, False),
    ("errors", "errors", _whole, False, False),
    ("TTFT p50", "ttft_p50_s", seconds, True, False),
    ("TTFT p95", "ttft_p95_s", seconds, False, True),
    ("TTFT p99", "ttft_p99_s", seconds, False, False),
    ("  p95, full / this", "ttft_p95_ratio", _times, False, True),
    ("targets missed", "slo_violations", _whole, False, True),
    ("  against full", "slo_violations_change", _signed, False, False),
    ("goodput per second", "goodput_per_s", _fixed(2), False, False),
    ("TPOT p50", "tpot_p50_s", seconds, True, False),
    ("TPOT p95", "tpot_p95_s", seconds, False, False),
    ("ITL p99", "itl_p99_s", seconds, False, False),
    ("end to end p95", "e2e_p95_s", seconds, False, False),
    ("output tokens per second", "output_tokens_per_s", _fixed(1), False, False),
    ("tokens at full precision", "level0_share", percent, True, False),
    ("  layer-weighted", "full_share", percent, False, False),
    ("  outside the burst", "full_share_outside_burst", percent, False, False),
    ("perplexity of outputs", "perplexity", _fixed(2), True, True),
    ("quality loss by levels", "level_loss", _signed, False, False),
    ("outputs equal to full's", "equal_to_full", percent, False, False),
    ("  common beginning", "common_prefix", percent, False, False),
    ("highest level", "max_level", _whole, True, False),
    ("most KV blocks", "max_kv_blocks", _whole, False, False),
    ("most live KV, of base", "peak_kv_share", _share, False, False),
    ("preemptions", "preemptions", _whole, False, False),
    ("back at level 0 after", "return_s", seconds, False, False),
    ("client behind, at most", "max_lateness_s", seconds, True, False),
)


def rows(result: Mapping[str, Any], spread: bool = True) -> list[Row]:
    """The lines; ``spread`` adds the least and the most of the repeats to the most important ones."""
    columns = result["configurations"]
    repeats = len(columns[0]["runs"])
    paper = {
        "ttft_p95_ratio": " (paper: {:g}–{:g} ×)".format(*result["paper"]["ttft_p95_ratio"]),
        "slo_violations_change": f" (paper: {_signed(result['paper']['slo_violations_change'])})",
    }
    told: list[Row] = []
    for name, figure, shown, heads_group, with_spread in _LINES:
        found = [column["figures"].get(figure) for column in columns]
        if not any(found):
            continue
        values = tuple(NOTHING if f is None else shown(f["median"]) for f in found)
        told.append(Row(name + paper.get(figure, ""), values, heads_group))
        if spread and with_spread and repeats > 1:
            told.append(Row("  least to most", tuple(_range(f, shown) for f in found)))
        if figure == "perplexity":
            changes = tuple(_change(column) for column in columns)
            told.append(Row("  against full", changes))
    return told


def _range(figure: Mapping[str, float] | None, shown: _Shown) -> str:
    if figure is None:
        return NOTHING
    low, high = shown(figure["min"]), shown(figure["max"])
    if low == high:
        return low
    # The unit stands in the line above, if it is the same for both.
    (low_number, _, low_unit), (high_number, _, high_unit) = low.partition(" "), high.partition(" ")
    return f"{low_number}–{high_number}" if low_unit == high_unit else f"{low}–{high}"


def _change(column: Mapping[str, Any]) -> str:
    found = column["perplexity_change"]
    if found is None or column["name"] == "full":
        return NOTHING
    return f"{found['mean'] * 100:+.1f} ± {found['standard_error'] * 100:.1f} %"


def render(result: Mapping[str, Any], width: int) -> list[Table]:
    """For a terminal of ``width`` columns: one table, or several that share the names where one would be too wide."""
    columns = result["configurations"]
    fitting = max(1, (width - _NAME_WIDTH) // (_VALUE_WIDTH + 1))
    lines = rows(result)
    return [_table(lines, columns, start, start + fitting) for start in range(0, len(columns), fitting)]


def _table(lines: Sequence[Row], columns: Sequence[Mapping[str, Any]], start: int, end: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0), header_style="bold")
    # Names fold where a terminal is narrow; figures never do.
    table.add_column("", min_width=_NAME_WIDTH)
    for column in columns[start:end]:
        table.add_column(column["label"], justify="right", width=_VALUE_WIDTH, overflow="fold")
    for i, row in enumerate(lines):
        table.add_row(row.name, *row.values[start:end], end_section=i + 1 < len(lines) and lines[i + 1].heads_group)
    return table


def headline(result: Mapping[str, Any]) -> str:
    """What the comparison says of the best morphing configuration, gains and losses alike."""
    columns: Sequence[Mapping[str, Any]] = result["configurations"]
    by_name = {column["name"]: column for column in columns}
    morphing = [c for c in columns if c["morphs"] and c["figures"]["ttft_p95_s"]]
    full = by_name["full"]["figures"]["ttft_p95_s"]
    if not morphing or not full:
        return "No morphing configuration has complete answers to compare."
    best = min(morphing, key=lambda c: float(c["figures"]["ttft_p95_s"]["median"]))
    figures = best["figures"]
    own, ratio = figures["ttft_p95_s"]["median"], figures["ttft_p95_ratio"]["median"]
    if figures["max_level"] and not figures["max_level"]["median"]:
        verdict = "the load never needed a change, as against"
    elif ratio >= 1.05:
        verdict = f"{ratio:.1f} times better than"
    else:
        verdict = "no gain over" if ratio > 0.95 else f"{1 / ratio:.2f} times worse than"
    said = f"{best['label'].capitalize()}: p95 time to first token {seconds(own)}, {verdict} full precision"
    statics = [by_name[name] for name in ("w8", "w4") if name in by_name]
    known = [(static["label"], static["figures"]["ttft_p95_s"]) for static in statics]
    others = "".join(f", {label} {seconds(ttft['median'])}" for label, ttft in known if ttft)
    said += f" ({seconds(full['median'])}){others}."
    if figures["level0_share"]:
        said += f" {percent(figures['level0_share']['median'])} of its tokens had every layer at full precision."
    changed = [f"{c['label']} {_change(c)}" for c in (best, *statics) if _change(c) != NOTHING]
    if changed:
        said += f" Perplexity of what was generated, against full precision: {', '.join(changed)}."
    return said
