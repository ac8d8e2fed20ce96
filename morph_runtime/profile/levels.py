"""`morph quality`: which mixes are measured, and the report of what they cost."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from morph_runtime.config import EngineConfig
from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import Rung
from morph_runtime.morph.levels import LevelPlan
from morph_runtime.profile.order_file import is_order_file, resolve_order
from morph_runtime.profile.quality import Figures, measure
from morph_runtime.profile.session import Say, Session
from morph_runtime.profile.weights import FORM_RUNG, Form, Mix, full_mix

FORMAT = 1
"""Version of the report's form."""
STEPS = 6
"""Levels per rung that are measured unless the user says which."""
RANDOM = "random:"


@dataclass(frozen=True)
class Selection:
    """What of a model is measured."""

    ladders: Sequence[tuple[Rung, ...]]
    orders: Sequence[str]
    """As `morph.order` has them, and `random:SEED`."""
    levels: Sequence[int]
    """Empty: every `every`-th."""
    every: int
    """0: so many that each rung has about six."""


@dataclass(frozen=True)
class Series:
    """A ladder walked down in one order, with W4 from one source."""

    ladder: tuple[Rung, ...]
    order_name: str
    plan: LevelPlan
    w4: str
    """`rtn`: rounded to nearest; `awq`; empty: it has no W4."""
    mixes: Mapping[int, Mix]
    """By level, 0 apart."""


def parse_ladder(text: str) -> tuple[Rung, ...]:
    """`w8`, `w4` or `w8,w4`.

    Raises:
        ConfigError: it is none.
    """
    rungs = EngineConfig.from_mapping({"morph": {"ladder": text.split(",")}}).morph.ladder
    return tuple(rung for rung in ("w8", "w4") if rung in rungs)


def parse_levels(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers.

    Raises:
        ConfigError: it is something else.
    """
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(f"--levels must be whole numbers separated by commas, but is '{text}'.")
    return tuple(sorted({int(part) for part in parts}))


def choose(session: Session, selection: Selection) -> list[Series]:
    """Every series that the selection asks for.

    Raises:
        ConfigError: a level beyond all ladders, or an order that is none.
    """
    deepest = max(len(ladder) for ladder in selection.ladders) * session.layers
    beyond = [level for level in selection.levels if level > deepest]
    if beyond:
        raise ConfigError(f"--levels names {beyond[0]}, but the deepest level is {deepest}.")
    found = []
    for ladder in selection.ladders:
        for text in selection.orders:
            plan = LevelPlan(_order(session, text, ladder[-1]), ladder)
            levels = _levels(selection, plan)
            sources = [""] if "w4" not in ladder else ["awq" if session.model.packed_awq else "rtn"]
            if "w4" in ladder and "awq" in session.store.models:
                sources.append("awq")
            for source in sources:
                beside = source == "awq" and "awq" in session.store.models
                mixes = {level: _mix(plan, level, beside) for level in levels}
                name = Path(text).name if is_order_file(text) else text
                found.append(Series(ladder, name, plan, source, mixes))
    return found


def report(session: Session, series: Sequence[Series], say: Say) -> dict[str, Any]:
    """Measure, and put the figures together as JSON."""
    mixes = [mix for one in series for mix in one.mixes.values()]
    figures = measure(session.forward, session.store, session.windows, mixes, say)
    full = figures[full_mix(session.layers)]
    slots = {form: session.store.slot_bytes(form) for form in session.store.models}
    return {
        "format": FORMAT,
        **session.head(),
        "kernels": {form: model.slots.kernel_names(FORM_RUNG[form]) for form, model in session.store.models.items()},
        "layer_bytes": slots,
        "full": _row(full, full, session),
        "series": [
            {
                "ladder": list(one.ladder),
                "order": one.order_name,
                "layer_order": list(one.plan.order),
                "w4": one.w4,
                "rows": [
                    {
                        "level": level,
                        **{rung: one.plan.rungs(level).count(rung) for rung in ("full", "w8", "w4")},
                        "layer_bytes_share": round(
                            sum(slots[form] for form in mix) / (session.layers * slots["full"]), 4
                        ),
                        **_row(figures[mix], full, session),
                    }
                    for level, mix in one.mixes.items()
                ],
            }
            for one in series
        ],
    }


def _row(figures: Figures, full: Figures, session: Session) -> dict[str, float]:
    values = {name: round(value, 7) for name, value in asdict(figures).items()}
    return values | {
        "perplexity_change": round(figures.perplexity / full.perplexity - 1, 7),
        "bits_per_byte": round(figures.loss / 0.6931471805599453 / session.windows.bytes_per_token, 5),
    }


def _order(session: Session, text: str, rung: Rung) -> tuple[int, ...]:
    model, layers = session.model, session.layers
    if text == "auto":
        return model.plan.order
    if text.startswith(RANDOM):
        seed = text.removeprefix(RANDOM)
        if not (seed.isascii() and seed.isdigit()):
            raise ConfigError(f"--order random:SEED takes a whole number as seed, but is '{text}'.")
        return tuple(random.Random(int(seed)).sample(range(layers), layers))
    return resolve_order(text, model.host_slots, layers, rung)


def _levels(selection: Selection, plan: LevelPlan) -> list[int]:
    if selection.levels:
        return [level for level in selection.levels if 0 < level <= plan.max_level]
    every = selection.every or max(1, round(plan.num_layers / STEPS))
    ends = {plan.num_layers * (n + 1) for n in range(len(plan.ladder))}
    return sorted(ends | set(range(every, plan.max_level + 1, every)))


def _mix(plan: LevelPlan, level: int, beside: bool) -> Mix:
    """The forms of a level; `beside`: W4 is the AWQ checkpoint's that stands beside the model."""
    forms: Mapping[Rung, Form] = {"full": "full", "w8": "w8", "w4": "awq" if beside else "w4"}
    return tuple(forms[rung] for rung in plan.rungs(level))
