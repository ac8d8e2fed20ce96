"""From timed steps to a cost model: differences for what attention reads, the rest as curves over the tokens of a step.

Weights are one over the time, for it is relative errors that count. A coefficient that comes out negative is nothing
but noise: it is set to 0, and the others are fitted without it (non-negative least squares of two unknowns).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from morph_runtime.costs.probe import Shape
from morph_runtime.morph.costs import Floats

Times = Mapping[Shape, float]
LEAST_SHARE = 0.1
"""Of a step's time, what is left at least for its linear parts when attention's is taken off."""


@dataclass(frozen=True)
class StepFit:
    """The fields of `StepCosts` that steps tell."""

    tokens: Floats
    whole_s: Floats
    context_s: float
    mean_context_s: float
    pair_s: float
    chunk_s: float
    prompt_s: Floats
    row_s: float
    step_sizes: tuple[int, ...] = ()
    padded_s: Floats | None = None


@dataclass(frozen=True)
class _Reads:
    """What attention takes."""

    context_s: float
    mean_context_s: float
    pair_s: float
    chunk_s: float

    def of(self, shape: Shape) -> float:
        """Seconds of a step."""
        decodes = (shape.decodes * self.context_s + self.mean_context_s) * shape.context if shape.decodes else 0.0
        prefill = shape.pairs * (self.pair_s + self.chunk_s / shape.prefill) if shape.prefill else 0.0
        return decodes + prefill


def fit_steps(by_rung: Sequence[Times], others: Times, step_sizes: tuple[int, ...] = ()) -> StepFit:
    """Fit the model.

    Args:
        by_rung: per rung, `full` first, all layers at it: steps of decodes of one context, and prompts'
            first chunks. The first rung has at least one step; one that others lack is scaled from its neighbours.
        others: further steps at full precision, in any number: the more are missing, the more is left at 0.
        step_sizes: to which steps with prompt tokens are padded, ascending; empty: they are not. If no such step was
            timed, they are taken not to be.
    """
    full = {**others, **by_rung[0]}
    reads = _fit_reads(full)
    bare = [{shape: _less(seconds, reads.of(shape)) for shape, seconds in times.items()} for times in by_rung]
    padded = None
    if step_sizes:
        padded = _fit_padded(bare, step_sizes)
        bare = [{shape: seconds for shape, seconds in times.items() if not shape.prefill} for times in bare]
    sizes = sorted({shape.tokens for shape in bare[0]})
    rows = [{shape.tokens: seconds for shape, seconds in times.items()} for times in bare]
    curves = [_curve(row, rows[0], sizes) for row in rows]
    if sizes[0] > 1 or len(sizes) < 2:  # too slow for more: the time is that of the weights, however few the tokens
        sizes = sorted({1, 2, *sizes})
        known = sorted({shape.tokens for shape in bare[0]})
        curves = [np.interp(sizes, known, curve) for curve in curves]
    tokens, whole = np.array(sizes, dtype=np.float64), np.array(curves)
    found = (tokens, whole, reads.context_s, reads.mean_context_s, reads.pair_s, reads.chunk_s)
    if padded is not None:
        row_s = _fit_row(others, reads, lambda count: float(padded[0][_place(step_sizes, count)]))
        return StepFit(*found, np.zeros(len(tokens)), row_s, step_sizes, padded)
    prompts = _fit_prompts(others, reads, tokens, whole[0])
    row_s = _fit_row(others, reads, lambda count: float(np.interp(count, tokens, whole[0] + prompts)))
    return StepFit(*found, prompts, row_s)


def non_negative(features: Floats, values: Floats, weights: Floats) -> Floats:
    """Coefficients, none negative, of the least weighted squares; features [N, 2], values and weights [N]."""
    if not len(values):
        return np.zeros(2)
    scaled, wanted = features * weights[:, None], values * weights
    best, least = np.zeros(2), float((wanted**2).sum())
    for columns in ((0, 1), (0,), (1,)):
        part: Floats = scaled[:, columns]
        found, _, rank, _ = np.linalg.lstsq(part, wanted, rcond=None)
        error = float(((part @ found - wanted) ** 2).sum())
        if rank == len(columns) and (found >= 0).all() and error < least:
            best, least = np.zeros(2), error
            best[list(columns)] = found
            if len(columns) == 2:
                break
    return best


def _less(seconds: float, reads_s: float) -> float:
    return max(seconds - reads_s, LEAST_SHARE * seconds)


def _fit_reads(times: Times) -> _Reads:
    """From differences between steps that differ only in what they read."""
    groups: defaultdict[tuple[int, int], list[Shape]] = defaultdict(list)
    for shape in times:
        if not (shape.decodes and shape.prefill):
            groups[shape.decodes, shape.prefill].append(shape)
    rows: dict[bool, list[tuple[float, float, float, float]]] = {False: [], True: []}
    for (decodes, prefill), shapes in groups.items():
        first, *rest = sorted(shapes, key=lambda shape: (shape.context, shape.start))
        for shape in rest:
            more = times[shape] - times[first]
            if decodes:
                context = shape.context - first.context
                rows[False].append((decodes * context, context, more, 1 / times[shape]))
            else:
                pairs = shape.pairs - first.pairs
                rows[True].append((pairs, pairs / prefill, more, 1 / times[shape]))
    found = []
    for prefills in (False, True):
        table = np.array(rows[prefills], dtype=np.float64).reshape(-1, 4)
        found += non_negative(table[:, :2], table[:, 2], table[:, 3]).tolist()
    return _Reads(*found)


def _curve(row: Mapping[int, float], full: Mapping[int, float], sizes: Sequence[int]) -> Floats:
    """Times at `sizes`. What was not timed at this rung has the ratio to full precision of its neighbours. More tokens
    never take less: where they seem to, the fewer were disturbed.
    """
    known = sorted(set(row) & set(full))
    ratios = np.interp(sizes, known, [row[n] / full[n] for n in known]) if known else np.ones(len(sizes))
    times = np.array([row.get(n, full[n] * ratio) for n, ratio in zip(sizes, ratios, strict=True)])
    rising: Floats = np.minimum.accumulate(times[::-1])[::-1]
    return rising


def _fit_prompts(others: Times, reads: _Reads, tokens: Floats, full: Floats) -> Floats:
    """What short chunks take beyond as many decodes; nothing beyond the sizes that decodes were timed at."""
    found = {
        shape.tokens: _less(seconds, reads.of(shape)) - float(np.interp(shape.tokens, tokens, full))
        for shape, seconds in others.items()
        if shape.prefill and not shape.decodes and not shape.start and shape.tokens <= tokens[-1]
    }
    if not found:
        return np.zeros(len(tokens))
    most, sizes = max(found), sorted(found)
    inside = np.interp(tokens, sizes, [found[n] for n in sizes])
    return np.where(tokens <= most, inside, 0.0)


def _fit_padded(bare: Sequence[Times], step_sizes: Sequence[int]) -> Floats | None:
    """Steps with prompt tokens by the size to which they are padded, [rungs, S]; None if none was timed.

    Between sizes that were timed a straight line; beyond the longest as steep as from half of it on.
    """
    rows = [
        {step_sizes[_place(step_sizes, shape.tokens)]: seconds for shape, seconds in times.items() if shape.prefill}
        for times in bare
    ]
    sizes = sorted(rows[0])
    if not sizes:
        return None
    curves = np.array([_curve(row, rows[0], sizes) for row in rows])  # [rungs, timed]
    wanted, longest = np.array(step_sizes, dtype=np.float64), float(sizes[-1])
    inside = np.array([np.interp(wanted, sizes, curve) for curve in curves])
    before = np.array([np.interp(longest / 2, sizes, curve) for curve in curves])
    slopes = np.maximum(curves[:, -1] - before, 0.0) / (longest / 2)
    padded: Floats = inside + slopes[:, None] * np.maximum(wanted - longest, 0.0)
    return padded


def _place(step_sizes: Sequence[int], count: int) -> int:
    """Index of the size that holds so many tokens; the last if none does."""
    return min(bisect_left(step_sizes, count), len(step_sizes) - 1)


def _fit_row(others: Times, reads: _Reads, prompts: Callable[[int], float]) -> float:
    """What a decode takes in a step with a chunk; `prompts` says what such a step takes without it, by its tokens."""
    both = [shape for shape in others if shape.prefill and shape.decodes]
    if not both:
        return 0.0
    rest = [others[shape] - reads.of(shape) - prompts(shape.tokens) for shape in both]
    counts = np.array([shape.decodes for shape in both], dtype=np.float64)
    weights = np.array([1 / others[shape] for shape in both])
    return float(non_negative(np.stack([counts, 0 * counts], axis=1), np.array(rest), weights)[0])
