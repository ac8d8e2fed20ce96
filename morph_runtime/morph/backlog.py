"""Everything that waits, in one line, for the forecast: what the engine sees of it, what it does not, what will come.

The line is a function of its place x: tokens to compute and blocks to take up to x. Places are requests; parts of one
are allowed, which is what keeps a forecast's cost independent of how many wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from morph_runtime.morph.load import Floats, Ints, Load

ENDLESS = 1e7
"""Requests that will come, at most."""
SEEN_SAMPLES = 12
"""Requests in the engine whose TTFT is forecast, each for its neighbours."""
OUTER_SAMPLES = 4
"""The same of the outer queue, and of requests to come, for each class."""


@dataclass(frozen=True)
class Sample:
    """Requests that are looked at, each standing for `weight` of them; arrays have S entries.

    Attributes:
        place: float64 [S], where each stands in the line; its first token needs the line done up to place + 1.
        age_s: float64 [S], since its arrival, or since it was preempted.
        slo: int64 [S], its class.
        weight: float64 [S].
    """

    place: Floats
    age_s: Floats
    slo: Ints
    weight: Floats


@dataclass(frozen=True)
class Backlog:
    """The line.

    Attributes:
        place: float64 [P], places at which the next two have a corner, from 0 on.
        tokens: float64 [P], tokens to compute up to there.
        blocks: float64 [P], blocks to take.
        begun: requests at its front that hold their blocks already (prefills under way).
        length: requests that are here now, in the engine and in the outer queue.
        prompt: mean tokens to compute of a request that is not begun.
        reach: mean number of tokens that one of these attends to.
        output: mean tokens that a request will generate.
        own: blocks that one takes when it is admitted, as far as it does not share them.
        sample: requests that wait for a token: their first, or the next one after a preemption.
    """

    place: Floats
    tokens: Floats
    blocks: Floats
    begun: int
    length: float
    prompt: float
    reach: float
    output: float
    own: float
    sample: Sample


def backlog_of(load: Load) -> Backlog:
    """Put everything that waits into one line: prefills under way, the engine's line, the outer queue, the future."""
    running, waiting, typical = load.running, load.waiting, load.typical
    under_way = np.flatnonzero(running.uncomputed > 1)
    compute = np.concatenate([running.uncomputed[under_way], waiting.tokens - waiting.cached]).astype(np.float64)
    compute = np.maximum(compute, 1.0)
    attended = np.concatenate([running.context[under_way], waiting.cached]) + compute / 2
    take = np.concatenate([np.zeros(len(under_way)), waiting.blocks])
    prompt = max(typical.prompt - typical.cached, 1.0)
    own = max(-(-typical.prompt // load.block_tokens) - typical.cached // load.block_tokens, 1.0)
    seen, pending = len(compute), float(load.pending)
    length = seen + pending
    steps = np.array([pending, ENDLESS])
    # Means are of what is still to get in, the next to come among it: what is left of a prefill is no prompt's length.
    lined, unseen = len(waiting) + pending, pending + 1.0
    entering = float(compute[len(under_way) :].sum()) + unseen * prompt
    total = float(compute.sum()) + unseen * prompt
    pairs = float((compute * attended).sum()) + unseen * prompt * (typical.cached + prompt / 2)
    output = (float(waiting.output.sum()) + pending * typical.output) / lined if lined else typical.output
    return Backlog(
        place=np.concatenate([np.arange(seen + 1.0), seen + np.cumsum(steps)]),
        tokens=np.cumsum(np.concatenate([[0.0], compute, steps * prompt])),
        blocks=np.cumsum(np.concatenate([[0.0], take, steps * own])),
        begun=len(under_way),
        length=length,
        prompt=entering / (lined + 1.0),
        reach=pairs / total,
        output=max(output, 1.0),
        own=own,
        sample=_sample(load, under_way, seen, pending),
    )


def _sample(load: Load, under_way: Ints, seen: int, pending: float) -> Sample:
    running, waiting = load.running, load.waiting
    ages = np.concatenate([running.age_s[under_way], waiting.age_s])
    classes = np.concatenate([running.slo[under_way], waiting.slo])
    # The one in the middle of each group speaks for it. A stream that a preemption has stopped counts like one that has
    # not begun: whoever reads it waits for its next token as others do for their first.
    groups = np.array_split(np.arange(seen), min(SEEN_SAMPLES, max(seen, 1)))
    picked = np.array([group[len(group) // 2] for group in groups if len(group)], dtype=np.int64)
    weights = np.array([float(len(group)) for group in groups if len(group)])
    oldest = 0.0 if load.outer is None else load.outer.oldest_s
    shares = load.typical.slo_shares if len(load.typical.slo_shares) else np.ones(1)
    kinds = np.flatnonzero(shares > 0)
    part = (np.arange(OUTER_SAMPLES) + 0.5) / OUTER_SAMPLES if pending else np.zeros(0)
    count = len(part) * len(kinds)
    return Sample(
        place=np.concatenate([picked, np.repeat(seen + np.floor(part * pending), len(kinds))]),
        age_s=np.concatenate([ages[picked], np.repeat((1 - part) * oldest, len(kinds))]),
        slo=np.concatenate([classes[picked], np.tile(kinds, len(part))]),
        weight=np.concatenate([weights, np.tile(shares[kinds], len(part)) * pending / OUTER_SAMPLES])
        if count
        else weights,
    )
