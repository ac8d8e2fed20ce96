"""How far a cost model is off on steps that it was not fitted to: other levels, other sizes, mixed steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from morph_runtime.costs.probe import Shape, StepProbe
from morph_runtime.costs.timing import time_shapes
from morph_runtime.engine.core import EngineParts
from morph_runtime.morph.costs import StepCosts
from morph_runtime.morph.levels import LevelPlan
from morph_runtime.morph.shifter import ShiftCounters


@dataclass(frozen=True)
class HeldOut:
    """One step: what it took, and what the model says."""

    level: int
    shape: Shape
    real_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative to the real time."""
        return self.predicted_s / self.real_s - 1

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        return {
            "level": self.level, **asdict(self.shape), "real_s": round(self.real_s, 7),
            "predicted_s": round(self.predicted_s, 7), "error": round(self.error, 4),
        }  # fmt: skip


def held_out_levels(plan: LevelPlan) -> list[int]:
    """Those at which all layers are at one rung, and one between each two of these."""
    layers = plan.num_layers
    return sorted({half * layers // 2 for half in range(2 * len(plan.ladder) + 1)})


def held_out_shapes(probe: StepProbe) -> list[Shape]:
    """Sizes that lie between those that a model is fitted to, with contexts that fit into the cache."""
    parts = probe.parts
    settings, longest = parts.config.scheduler, parts.max_model_len
    seqs, tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    room = max(parts.capacities[0] * parts.config.memory.block_tokens - longest, 0)
    counts = sorted({max(1, seqs * share // 64) for share in (3, 6, 12, 24, 40, 56)})
    shapes = [Shape(n, context) for n in counts for context in (longest // 20, longest // 8, longest // 3)]
    chunks = [(tokens * 11 // 16, 0), (tokens * 5 // 16, longest // 3), (tokens // 5, longest // 2), (tokens // 10, 0)]
    shapes += [Shape(0, 0, n, start) for n, start in chunks]
    few, many = max(1, seqs // 8), max(1, seqs * 3 // 4)
    mixed = [
        (few, longest // 8, tokens - few, 0),
        (few, longest // 4, tokens // 3, longest // 4),
        (many, longest // 16, tokens // 2, longest // 8),
        (many, longest // 20, tokens // 8, 0),
    ]
    shapes += [Shape(n, min(context, room // n), chunk, start) for n, context, chunk, start in mixed]
    fits = [shape for shape in dict.fromkeys(shapes) if probe.shape_fits(shape, parts.capacities[0])]
    return [s for s in fits if s.tokens and (s.context or not s.decodes) and (s.prefill or s.decodes)]


def check_held_out(
    parts: EngineParts, plan: LevelPlan, costs: StepCosts, budget_s: float, clock: Callable[[], float] | None = None
) -> Sequence[HeldOut]:
    """Time steps at some levels and compare. The engine serves nobody; it is back at level 0 afterwards.

    Args:
        parts: the engine's.
        plan: its levels.
        costs: the model.
        budget_s: seconds for all steps, shifts apart.
        clock: as of `measure`.
    """
    probe, levels = StepProbe(parts, clock), held_out_levels(plan)
    shapes, found = held_out_shapes(probe), []
    try:
        for level in levels if shapes else ():
            parts.shifter.target = level
            parts.shifter.settle()
            with probe.borrow_blocks():
                times = time_shapes(probe, shapes, budget_s / len(levels), 0)
            now = parts.shifter.level
            found += [HeldOut(now, shape, real, shape.predicted_s(costs, now)) for shape, real in times.items()]
    finally:
        parts.shifter.target = 0
        parts.shifter.settle()
        parts.shifter.counters = ShiftCounters()
    return found
