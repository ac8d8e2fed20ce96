"""Which steps are timed for a cost model, what matters most first."""

from __future__ import annotations

from collections.abc import Sequence

from morph_runtime.costs.probe import Shape, StepProbe

USUAL_CONTEXT = 128
MIN_PREFILL = 16
MIN_EDGE = 16
"""Batches of decodes up to which a graph for the next power of two costs next to nothing more."""
NEAR = 1.33
"""Ratio of sizes between which a straight line does if there is no time for more."""
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


def rung_shapes(probe: StepProbe) -> list[Shape]:
    """Steps that are timed at every rung: decodes of one context, and chunks that begin a prompt.

    Where steps are padded, chunks are of the sizes to which they are; decodes are padded to powers of two, so they are
    timed on both sides of each step of that staircase. Sizes near to others come last.
    """
    parts = probe.parts
    settings, padded = parts.config.scheduler, parts.runner.step_sizes
    seqs, usual = settings.max_num_seqs, usual_context(probe)
    decodes, edges = decode_shapes(seqs, usual), []
    if padded:
        longest = min(settings.max_num_batched_tokens, parts.max_model_len)
        every = list(dict.fromkeys(min(n, longest) for n in padded))
        chunks = [Shape(0, prefill=n) for n in spread(every)]
        ends = [*chunks[-1:], *chunks[:1]]
        edges = [Shape(n + 1, usual) for n in sizes(seqs) if MIN_EDGE <= n < seqs - 1]
        edges += [Shape(0, prefill=n) for n in every]
    else:
        chunks = prefill_shapes(seqs, settings.max_num_batched_tokens)
        ends = [*chunks[:1], *chunks[-1:]]
    ordered = dict.fromkeys((decodes[0], decodes[-1], *ends, *decodes, *chunks, *edges))
    return [shape for shape in ordered if probe.shape_fits(shape, parts.capacities[0])]


def spread(numbers: Sequence[int]) -> list[int]:
    """Of ascending numbers the first, the last, and between them no two nearer than `NEAR`, ascending."""
    kept = [numbers[-1]]
    for number in reversed(numbers[:-1]):
        if number * NEAR <= kept[-1]:
            kept.append(number)
    return sorted({numbers[0], *kept})


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

    What matters most comes first. Where steps are padded, short chunks are among `rung_shapes`.
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
    if not parts.runner.step_sizes:
        shapes += [Shape(0, prefill=n) for n in sizes(seqs) if n > 1 and n >= min(MIN_PREFILL, seqs)]
    count = max(1, int(min(seqs - 1, tokens // 2) * MANY_DECODES))
    chunks = [min((tokens - count) // part, longest) for part in (1, 3)]
    if parts.runner.step_sizes:
        chunks += [(tokens - count) // part for part in (8, 16)]  # steps so short that it shows what a decode adds
    shapes += [Shape(count, usual, n) for n in chunks if n > 1]
    if parts.runner.step_sizes and (some := seqs // 4) > 1:  # contexts as in serving
        context = min(longest, base // some) // block * block
        shapes += [Shape(some, context), Shape(some, context // 2)]
    fits = [s for s in dict.fromkeys(shapes) if s.tokens and probe.shape_fits(s, parts.capacities[0])]
    return [s for s in fits if s.context > usual or s.prefill]
