"""How steps are timed for a cost model: rounds over all of them within a time budget, and doubtful ones again."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median_low

from morph_runtime.costs.probe import Shape, StepProbe

MAX_ROUNDS = 5
PATIENCE = 3
"""Where steps are timed in processor time, other processes may take the rest of so many times as many seconds."""
FIRST_SHARE = 0.7
"""Of the budget, what the first round may take."""
AGREE = 0.02
"""Two samples that differ by no more than this, relative, support each other."""
FEW_TOKENS, FEW_STEPS = 512, 3
"""Steps of so few tokens are timed in runs of so many: what disturbs one of them is long beside the step."""
MORE = 2
"""Times the budget: how long steps may be timed again whose samples, or whose times, contradict each other."""
LOOKS, LOOK_SAMPLES = 3, 2
"""How often doubtful steps are timed again, and how often each time."""
TOLERANCE = 0.03
"""By which a time may break a rule before it is doubted."""


def time_shapes(probe: StepProbe, shapes: Sequence[Shape], budget_s: float, needed: int) -> Mapping[Shape, float]:
    """Seconds of each step. The blocks are borrowed.

    Rounds over all shapes, not repetitions of each: what disturbs the machine for a moment then meets every shape at
    most once. Of the rounds the least time counts, for disturbances only ever add. The first round tells what fits into
    the budget: shapes that do not are left out, from the end of the list, but for the first `needed`.

    With overlap, where a sample is a run of steps, a shape is done when two of its samples support each other
    (`supported`), and times that contradict others are taken again at the end (`doubtful`): what slows down a host for
    a second or two meets all rounds of a shape.

    Args:
        probe: runs them.
        shapes: what matters most comes first; at least one.
        budget_s: seconds by the clock of the steps; no more than `PATIENCE` times that pass meanwhile. More only if the
            `needed` ones take more, and `MORE` times it for contradictions.
        needed: shapes that are timed in any case.
    """
    clock_began, began = probe.clock(), time.monotonic()

    def spent_s() -> float:
        return max(probe.clock() - clock_began, (time.monotonic() - began) / PATIENCE)

    samples: dict[Shape, list[float]] = {}
    probe.run(shapes[0])
    for place, shape in enumerate(shapes):
        if place >= needed and spent_s() > FIRST_SHARE * budget_s:
            break
        samples[shape] = [probe.run(shape, _steps(shape))]
    for _ in range(MAX_ROUNDS - 1):
        for shape, seen in samples.items():
            most_s = MORE * budget_s if probe.steady and len(seen) > 1 else budget_s
            if spent_s() <= most_s and not (probe.steady and agree(seen)):
                seen.append(probe.run(shape, _steps(shape)))
    if not probe.steady:
        return {shape: min(seen) for shape, seen in samples.items()}
    for _ in range(LOOKS):
        for shape in doubtful({shape: supported(seen) for shape, seen in samples.items()}):
            if spent_s() <= MORE * budget_s:
                samples[shape] += [probe.run(shape, _steps(shape)) for _ in range(LOOK_SAMPLES)]
    return {shape: supported(seen) for shape, seen in samples.items()}


def supported(samples: Sequence[float]) -> float:
    """What runs of steps tell: the mean of the two least that support each other; if there are none, the median.

    Not the least: if the host is late in seeing the end of a step, the next one seems to take less. Of two that
    contradict each other, the lesser.
    """
    pair = _pair(samples)
    return sum(pair) / 2 if pair else median_low(samples)


def agree(samples: Sequence[float]) -> bool:
    """Whether two samples support each other."""
    return _pair(samples) is not None


def _pair(samples: Sequence[float]) -> tuple[float, float] | None:
    """The two least samples that support each other."""
    pairs = pairwise(sorted(samples))
    return next(((less, more) for less, more in pairs if more <= less * (1 + AGREE)), None)


def doubtful(times: Mapping[Shape, float]) -> list[Shape]:
    """Shapes whose times contradict each other.

    More tokens never take less time, and never more than two steps that hold them together: of steps that differ in
    nothing but the number of their prompt tokens, or of their decodes if they have no prompt tokens.
    """
    families: defaultdict[tuple[int, ...], list[Shape]] = defaultdict(list)
    for shape in times:
        alike = (shape.context, shape.decodes, shape.start) if shape.prefill else (shape.context,)
        families[alike].append(shape)
    found: dict[Shape, None] = {}
    for family in families.values():
        family.sort(key=lambda shape: shape.tokens)
        for less, more in pairwise(family):
            rest = next(shape for shape in family if shape.tokens >= more.tokens - less.tokens)
            most = (times[less] + times[rest]) * (1 + TOLERANCE)
            if times[more] > most or times[less] > times[more] * (1 + TOLERANCE):
                found |= dict.fromkeys((less, more))
    return list(found)


def _steps(shape: Shape) -> int:
    return FEW_STEPS if shape.tokens <= FEW_TOKENS else 1
