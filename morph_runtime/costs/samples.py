"""Which steps are timed for a cost model, and how: rounds over all of them within a time budget, the least of each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from morph_runtime.costs.probe import Shape, StepProbe

MAX_ROUNDS = 5
USUAL_CONTEXT = 128
PATIENCE = 3
"""Where steps are timed in processor time, other processes may take the rest of so many times as many seconds."""
MIN_PREFILL = 16
FIRST_SHARE = 0.7
"""Of the budget, what the first round may take."""
MANY_DECODES = 0.5
"""Decodes of the step with a chunk that shows what a decode costs there, as a share of all that may run."""


def sizes(most: int, first: int = 1, factor: int = 2) -> list[int]:
    """`first`, then `factor` times as much each, and `most` itself."""
    steps = [first]
    while steps[-1] * factor < most:
        steps.append(steps[-1] * factor)
    return [*steps, most] if most > steps[-1] else [min(first, most)]


def usual_context(probe: StepProbe) -> int:
    """Tokens of context at which batches of decodes are compared: whole blocks, and room for all that may run.

    Not one block each: attention has other ways for next to nothing (on a CPU, one call in place of five), and their
    times would be taken for those of serving.
    """
    parts = probe.parts
    block = parts.config.memory.block_tokens
    room = parts.capacities[0] * block // parts.config.scheduler.max_num_seqs
    return max(block, min(USUAL_CONTEXT, parts.max_model_len // 8, room) // block * block)


def decode_shapes(max_num_seqs: int, context: int) -> list[Shape]:
    """Steps of decodes alone, the fewest first; powers of two, as CUDA graphs are."""
    return [Shape(count, context) for count in sizes(max_num_seqs)]


def prefill_shapes(max_num_seqs: int, max_batched_tokens: int) -> list[Shape]:
    """Chunks that begin a prompt, longer than the steps of decodes, the shortest first."""
    first = 2 * max_num_seqs
    return (
        [Shape(0, prefill=n) for n in sizes(max_batched_tokens, first)]
        if first < max_batched_tokens
        else ([Shape(0, prefill=max_batched_tokens)] if max_batched_tokens > max_num_seqs else [])
    )


def other_shapes(probe: StepProbe) -> list[Shape]:
    """What does not depend on rungs, timed at level 0: long contexts, late chunks, short chunks, chunks beside decodes.

    What matters most comes first.
    """
    parts = probe.parts
    settings, block = parts.config.scheduler, parts.config.memory.block_tokens
    base, longest, usual = parts.capacities[0] * block, parts.max_model_len, usual_context(probe)
    seqs, tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    shapes = []
    for count in dict.fromkeys((seqs, 1, min(8, seqs), min(2, seqs))):
        context = min(longest, base // count) // block * block
        shapes.append(Shape(count, context))
        if count <= 2:
            shapes.append(Shape(count, context // 2))
    chunk = min(tokens, longest)
    shapes.append(Shape(0, prefill=chunk, start=longest - chunk))
    for length in dict.fromkeys((max(chunk // 4, 1), max(chunk // 16, 1))):
        shapes += [Shape(0, prefill=length, start=start) for start in (longest - length, (longest - length) // 2)]
    shapes += [Shape(0, prefill=n) for n in sizes(seqs) if n > 1 and n >= min(MIN_PREFILL, seqs)]
    count = max(1, int(min(seqs - 1, tokens // 2) * MANY_DECODES))
    shapes += [Shape(count, usual, min(n, longest)) for n in (tokens - count, (tokens - count) // 3) if n > 1]
    fits = [s for s in dict.fromkeys(shapes) if s.tokens and probe.shape_fits(s, parts.capacities[0])]
    return [s for s in fits if s.context > usual or s.prefill]


def time_shapes(probe: StepProbe, shapes: Sequence[Shape], budget_s: float, needed: int) -> Mapping[Shape, float]:
    """Seconds of each step. The blocks are borrowed.

    Rounds over all shapes, not repetitions of each: what disturbs the machine for a moment then meets every shape at
    most once. Of the rounds the least time counts, for disturbances only ever add. The first round tells what fits
    into the budget: shapes that do not are left out, from the end of the list, but for the first `needed`.

    Args:
        probe: runs them.
        shapes: what matters most comes first; at least one.
        budget_s: seconds by the clock of the steps; no more than `PATIENCE` times that pass meanwhile. More only if the
            `needed` ones take more.
        needed: shapes that are timed in any case.
    """
    clock_began, began = probe.clock(), time.monotonic()

    def spent_s() -> float:
        return max(probe.clock() - clock_began, (time.monotonic() - began) / PATIENCE)

    least: dict[Shape, float] = {}
    probe.run(shapes[0])
    for place, shape in enumerate(shapes):
        if place >= needed and spent_s() > FIRST_SHARE * budget_s:
            break
        least[shape] = probe.run(shape)
    for _ in range(MAX_ROUNDS - 1):
        for shape in least:
            if spent_s() > budget_s:
                return least
            least[shape] = min(least[shape], probe.run(shape))
    return least
