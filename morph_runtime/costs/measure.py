"""The cost model of an engine, measured before it serves: it walks down rung by rung, runs steps, and comes back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from morph_runtime.costs.fit import Times, fit_steps
from morph_runtime.costs.probe import Shape, StepProbe
from morph_runtime.costs.samples import other_shapes, rung_shapes
from morph_runtime.costs.timing import time_shapes
from morph_runtime.engine.core import EngineParts
from morph_runtime.morph.costs import StepCosts, layer_counts
from morph_runtime.morph.levels import LevelPlan
from morph_runtime.morph.shifter import ShiftCounters

STEPS_SHARE, OTHERS_SHARE, WALK_SHARE = 0.4, 0.3, 0.15
"""Of the time budget: for steps at the uniform rungs, for other steps at level 0, for one rung's way down or up."""
PADDED_STEPS_SHARE = 0.6
"""The first of these where steps are padded: there are more of them to time, and a GPU's walks take next to nothing."""
MIXED_S = 0.5
"""Seconds that a step of mixed rungs may be timed for."""
NEEDED = 2
"""Steps that are timed at each rung, however slow they are."""


@dataclass
class _Walk:
    """What was seen on the way down and up."""

    times: list[Times] = field(default_factory=list)
    """By rung that was reached."""
    downs_s: list[float] = field(default_factory=list)
    """Seconds of a layer, by rung of the ladder that was reached."""
    ups_s: list[float] = field(default_factory=list)
    mixed_s: float = 0.0


@dataclass(frozen=True)
class Measured:
    """A cost model and how it came about."""

    costs: StepCosts
    seconds: float
    """What the measuring took."""
    steps: Mapping[Shape, float]
    """The steps at full precision, with their times in seconds."""
    unreached: tuple[str, ...]
    """Rungs that could not be reached within the time: the model takes them to be as slow as the ones before."""


def measure(parts: EngineParts, plan: LevelPlan, budget_s: float, clock: Callable[[], float] | None = None) -> Measured:
    """Measure an engine that serves nobody yet. It is back at level 0 afterwards, and holds nothing of the steps.

    Args:
        parts: the engine's.
        plan: its levels.
        budget_s: seconds that it may take, roughly: a few steps at each rung and a layer each way are always timed.
        clock: of the steps, in seconds; None: see `probe.step_clock`.
    """
    began = time.monotonic()
    probe, walk = StepProbe(parts, clock), _Walk()
    grid, sizes = rung_shapes(probe), parts.runner.step_sizes
    steps_s = budget_s * (PADDED_STEPS_SHARE if sizes else STEPS_SHARE) / (1 + len(plan.ladder))
    try:
        with probe.borrow_blocks():
            walk.times.append(time_shapes(probe, grid, steps_s, NEEDED))
            others = time_shapes(probe, other_shapes(probe) or grid[:1], budget_s * OTHERS_SHARE, 0)
        for _ in plan.ladder:
            if not _down_a_rung(probe, plan, walk, list(walk.times[0]), steps_s, budget_s * WALK_SHARE):
                break
    finally:
        _up(parts, plan, walk)
    reached = len(walk.times)
    times = [*walk.times, *[walk.times[-1]] * (1 + len(plan.ladder) - reached)]
    fit = fit_steps(times, others, sizes)
    downs, ups = _filled(walk.downs_s, plan), _filled(walk.ups_s[::-1], plan)
    costs = StepCosts(
        rungs=("full", *plan.ladder),
        tokens=fit.tokens,
        whole_s=fit.whole_s,
        context_s=fit.context_s,
        pair_s=fit.pair_s,
        counts=layer_counts(plan),
        down_s=float(np.mean(downs)),
        up_s=float(np.mean(ups)),
        mean_context_s=fit.mean_context_s,
        chunk_s=fit.chunk_s,
        prompt_s=fit.prompt_s,
        row_s=fit.row_s,
        mixed_s=walk.mixed_s,
        downs_s=downs,
        ups_s=ups,
        depth=parts.swapper.depth,
        step_sizes=fit.step_sizes,
        padded_s=fit.padded_s,
        mixed_sizes=parts.runner.mixed_step_sizes if fit.step_sizes else (),
    )
    costs.check()
    unreached = tuple(plan.ladder[reached - 1 :])
    if unreached:
        logging.getLogger(__name__).warning(
            "cost model: %s could not be measured within %g s and counts as no faster: raise morph.cost_budget_s",
            " and ".join(unreached), budget_s,
        )  # fmt: skip
    return Measured(costs, time.monotonic() - began, {**walk.times[0], **others}, unreached)


def _down_a_rung(
    probe: StepProbe, plan: LevelPlan, walk: _Walk, grid: list[Shape], steps_s: float, walk_s: float
) -> bool:
    """Take layers down to the next rung, as many as the time allows, and time steps; whether all were taken down.

    Where they were not, what the others would save is extrapolated.
    """
    shifter, layers, first = probe.parts.shifter, plan.num_layers, probe.parts.shifter.level
    one_s = _shift(probe.parts, first + 1)
    if shifter.level != first + 1:
        return False  # the shifter has said why
    if probe.parts.order.queues and layers > 1 and not walk.mixed_s:
        walk.mixed_s = _mixed(probe, walk, grid[0])
    count = min(layers, 1 + int(max(0.0, walk_s - one_s) / max(one_s, 1e-9)))
    rest_s = _shift(probe.parts, first + count) if count > 1 else 0.0
    done = shifter.level - first
    walk.downs_s.append((one_s + rest_s) / done)
    with probe.borrow_blocks():
        times = time_shapes(probe, grid, steps_s, NEEDED)
    before, scale = walk.times[-1], layers / done
    least = {shape: before[shape] * 0.1 for shape in times if shape in before}
    walk.times.append(
        {s: max(before[s] + (seconds - before[s]) * scale, least[s]) for s, seconds in times.items() if s in before}
    )
    return done == layers


def _mixed(probe: StepProbe, walk: _Walk, shape: Shape) -> float:
    """What a step of decodes takes more once one layer differs from the others; its own saving is left aside."""
    with probe.borrow_blocks():
        (seconds,) = time_shapes(probe, [shape], MIXED_S, 1).values()
    return max(0.0, seconds - walk.times[-1][shape])


def _shift(parts: EngineParts, level: int) -> float:
    """Go to a level; seconds."""
    began = time.monotonic()
    parts.shifter.target = level
    parts.shifter.settle()
    return time.monotonic() - began


def _up(parts: EngineParts, plan: LevelPlan, walk: _Walk) -> None:
    """Go back to level 0, timed by rung, and forget that the engine has ever left it."""
    while parts.shifter.level:
        before = parts.shifter.level
        goal = (before - 1) // plan.num_layers * plan.num_layers
        seconds = _shift(parts, goal)
        if parts.shifter.level >= before:
            break  # the shifter has said why; the controller will ask again
        walk.ups_s.append(seconds / (before - parts.shifter.level))
    parts.shifter.counters = ShiftCounters()


def _filled(times: list[float], plan: LevelPlan) -> tuple[float, ...]:
    """One value per rung of the ladder; what was not seen is as the last that was."""
    known = times or [0.0]
    return tuple((known + [known[-1]] * len(plan.ladder))[: len(plan.ladder)])
