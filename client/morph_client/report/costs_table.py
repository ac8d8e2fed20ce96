"""The tables of ``morph costs``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

BAR = 0.10
"""The relative error that the model should stay within."""


def describe(profile: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    of = profile["identity"]
    threads = f"{of['threads']} thread{'' if of['threads'] == 1 else 's'}"
    return (
        f"{profile['name']}, {profile['num_layers']} layers, {of['dtype']} on {of['device']}, {threads}: "
        f"measured in {profile['measured_s']:.1f} s"
    )


def render_steps(profile: Mapping[str, Any]) -> Table:
    """One line per number of tokens: a step with an empty KV cache and all layers at one rung."""
    costs, seqs = profile["costs"], profile["max_num_seqs"]
    table = _table("Tokens of a step", *(f"{rung} ms" for rung in costs["rungs"]), "")
    for place, tokens in enumerate(costs["tokens"]):
        times = (f"{row[place] * 1e3:.2f}" for row in costs["whole_s"])
        table.add_row(f"{tokens:g}", *times, "decodes" if tokens <= seqs else "prompt")
    return table


def render_rest(profile: Mapping[str, Any]) -> Table:
    """What comes on top, and shifts."""
    costs = profile["costs"]
    table = _table("On top", "µs", "")
    for name, field, of in (
        ("context", "context_s", "per token of KV that decodes read"),
        ("mean context", "mean_context_s", "per token of the decodes' mean context"),
        ("pair", "pair_s", "per prompt token and token that it attends to"),
        ("mean pairs", "chunk_s", "per token that a prompt token attends to on average"),
        ("row", "row_s", "per decode in a step with prompt tokens"),
        ("mixture", "mixed_s", "per step of decodes between two rungs"),
    ):
        table.add_row(name, f"{costs[field] * 1e6:.4g}", of)
    ladder = costs["rungs"][1:]
    for way, every, each in (("down to", "down_s", "downs_s"), ("up from", "up_s", "ups_s")):
        for rung, seconds in zip(ladder, costs[each] or [costs[every]] * len(ladder), strict=True):
            table.add_row(f"{way} {rung}", f"{seconds * 1e6:.0f}", "per layer")
    return table


def render_held_out(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Errors by kind of step; the misses counted."""
    table = _table("Steps not fitted to", "number", "median error", "95 %", "largest", f"beyond {BAR:.0%}")
    kinds = {"decodes": (True, False), "prompts": (False, True), "both": (True, True)}
    for name, (decodes, prefill) in kinds.items():
        _add_errors(table, name, [r for r in rows if bool(r["decodes"]) == decodes and bool(r["prefill"]) == prefill])
    _add_errors(table, "all", rows)
    return table


def _add_errors(table: Table, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    errors = sorted(abs(row["error"]) for row in rows)
    if errors:
        middle, high = (errors[round(share * (len(errors) - 1))] for share in (0.5, 0.95))
        missed = sum(error > BAR for error in errors)
        table.add_row(name, str(len(errors)), f"{middle:.1%}", f"{high:.1%}", f"{errors[-1]:.1%}", str(missed))


def _table(first: str, *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column(first)
    for name in names:
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    return table
