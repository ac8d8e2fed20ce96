"""Choice of the next tokens on the GPU for rows with top_p, top_k, min_p, biases or bans; nothing is sorted.

What the three cuts leave of a row is a run from the largest score down, so it is named by one bound. The bound of top_k
is the largest from which on there are k scores; that of top_p the largest from which on the scores that min_p and top_k
leave weigh p of their sum. Both are searched for in the bits of the floats, which are ordered like the floats
themselves: a pass over the row weighs what lies above three bounds, and a quarter of the interval is left. Scores of
two bytes have few values, so eight passes are the most, four or five the usual: where the search begins follows from
the largest scores of groups (top_k), and from the weight that all small scores together cannot exceed (top_p).

One program looks after a row, so what it finds depends on nothing else, sums in their order included. Equal scores stay
or go together.

What it should cost on an H200 with 128,256 tokens in bfloat16, from the instructions of its loops (measured by
bench/gpu_kernels/shape.py): the logits were just written and lie in the L2 cache, 16.4 MB of 50 for 64 rows, and each
pass reads a row's 257 KB again. A pass is bound by instructions, 9 a token where it counts and 15 where it weighs: 6
and 10 us for one multiprocessor, which wants 26 to 43 GB/s meanwhile. top_k takes at most 9 passes, top_p 10. Scores
with a normal distribution need 3 to 6 for top_k 50, 6 to 10 for top_p 0.9 and 7 to 9 for both: 20 to 100 us, whatever
the number of rows up to that of multiprocessors, and twice that beyond. Several programs to a row would be faster for
few rows, at a launch per pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from morph_runtime.kernels.cuda.jit import kernel
from morph_runtime.kernels.cuda.sample import QUARTER, ROUNDS, Scan, gumbel

BLOCK = 4096
"""Tokens that a program has in its registers at a time."""
GROUPS = 64
"""Up to this top_k the search begins at the least of so many groups' largest scores."""
WARPS = 16
GRAINS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Low bits in which no two scores of a type differ once they are float32."""


@dataclass(frozen=True)
class RowShapes:
    """What rows ask for; a row with top_p 1, top_k 0, min_p 0 and no entries asks for nothing."""

    top_ps: Tensor
    """float32 [S], above 0"""
    top_ks: Tensor
    """int32 [S]; 0: no limit"""
    min_ps: Tensor
    """float32 [S]"""
    counts: Tensor
    """int32 [S]: entries"""
    tokens: Tensor
    """int32 [S, E], E a power of two: tokens of a row that are biased or banned, each once"""
    biases: Tensor
    """float32 [S, E]; -inf: banned"""

    def first(self, rows: int) -> RowShapes:
        """Of the first rows."""
        return RowShapes(*(getattr(self, name)[:rows] for name in self.__dataclass_fields__))


@kernel
def _lift(
    logits: tl.tensor, counts: tl.tensor, tokens: tl.tensor, biases: tl.tensor, lifted: tl.tensor,
    stride: tl.tensor, vocab: tl.tensor, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """Biased scores leave the row, whose type may be too coarse for them, and go on in float32."""
    row = tl.program_id(0)
    lane = tl.arange(0, ENTRIES)
    own = row * ENTRIES + lane
    inside = lane < tl.load(counts + row)
    token = tl.load(tokens + own, mask=inside, other=0)
    inside = inside & (token < vocab)
    place = logits + row.to(tl.int64) * stride + token
    score = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
    score += tl.load(biases + own, mask=inside, other=float("-inf"))
    tl.store(lifted + own, tl.where(score == score, score, float("-inf")))
    tl.store(place, float("-inf"), mask=inside)


@kernel
def _key(value: tl.tensor) -> tl.tensor:
    """An integer in the order of the floats."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@kernel
def _value(key: tl.tensor) -> tl.tensor:
    """The float of a key. NaN if it lies beyond the infinities: nothing is above that."""
    bits = key.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@kernel
def _weights(x: tl.tensor, peak: tl.tensor, rate: tl.tensor, WEIGHED: tl.constexpr) -> tl.tensor:
    """exp((x - peak) / temperature), or one each; rate = log2(e) / temperature."""
    if WEIGHED:
        return tl.exp2((x - peak) * rate)
    return tl.full(x.shape, 1.0, tl.float32)


@kernel
def _above(
    place: tl.tensor, extra: tl.tensor, vocab: tl.tensor, peak: tl.tensor, rate: tl.tensor,
    first: tl.tensor, second: tl.tensor, third: tl.tensor, WEIGHED: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """What the scores from each of three bounds on weigh."""
    lane = tl.arange(0, BLOCK)
    sum1 = tl.zeros([BLOCK], tl.float32)
    sum2 = tl.zeros([BLOCK], tl.float32)
    sum3 = tl.zeros([BLOCK], tl.float32)
    following = tl.load(place + lane, mask=lane < vocab, other=float("-inf"))
    for start in range(BLOCK, vocab + BLOCK, BLOCK):
        x = following.to(tl.float32)
        # On its way while these are weighed; behind the row's end nothing is read.
        following = tl.load(place + start + lane, mask=start + lane < vocab, other=float("-inf"))
        weight = _weights(x, peak, rate, WEIGHED)
        sum1 += tl.where(x >= first, weight, 0.0)
        sum2 += tl.where(x >= second, weight, 0.0)
        sum3 += tl.where(x >= third, weight, 0.0)
    weight = _weights(extra, peak, rate, WEIGHED)
    above1 = tl.sum(sum1, 0) + tl.sum(tl.where(extra >= first, weight, 0.0), 0)
    above2 = tl.sum(sum2, 0) + tl.sum(tl.where(extra >= second, weight, 0.0), 0)
    above3 = tl.sum(sum3, 0) + tl.sum(tl.where(extra >= third, weight, 0.0), 0)
    return above1, above2, above3


@kernel
def _bound(
    place: tl.tensor, extra: tl.tensor, vocab: tl.tensor, peak: tl.tensor, rate: tl.tensor, low: tl.tensor,
    target: tl.tensor, grain: tl.tensor, WEIGHED: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The largest bound from which on the scores weigh `target`; if that is below `low`, `low`.

    Exact in all but the `grain` lowest bits.
    """
    lo = _key(low) >> grain
    hi = (_key(peak) >> grain) + 1
    while hi - lo > 1:
        width = hi - lo
        at1 = lo + ((width + 3) >> 2)
        at2 = lo + ((2 * width + 3) >> 2)
        at3 = lo + ((3 * width + 3) >> 2)
        above1, above2, above3 = _above(
            place, extra, vocab, peak, rate, _value(at1 << grain), _value(at2 << grain), _value(at3 << grain),
            WEIGHED, BLOCK,
        )  # fmt: skip
        in1 = above1 >= target
        in2 = above2 >= target
        in3 = above3 >= target
        hi = tl.where(in3, hi, tl.where(in2, at3, tl.where(in1, at2, at1)))
        lo = tl.where(in3, at3, tl.where(in2, at2, tl.where(in1, at1, lo)))
        if (above1 == target) | (above2 == target) | (above3 == target):
            hi = lo + 1  # what is left out weighs nothing: no larger bound leaves other scores
    bound = _value(lo << grain)
    return tl.where(bound == bound, bound, float("-inf"))


@kernel
def _cut(
    place: tl.tensor, extra: tl.tensor, vocab: tl.tensor, temperature: tl.tensor, top_p: tl.tensor, top_k: tl.tensor,
    min_p: tl.tensor, GRAIN: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The score from which on a row's tokens may be drawn."""
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(place + start + lane, mask=start + lane < vocab, other=float("-inf")).to(tl.float32)
        largest = tl.where(x > largest, x, largest)
    lifted = tl.max(extra, 0)
    peak = tl.maximum(tl.max(largest, 0), lifted)
    cut = float("-inf")
    if (peak > float("-inf")) & (peak < float("inf")):
        rate = 1.4426950408889634 / temperature
        if min_p > 0.0:
            cut = peak + temperature * tl.log(min_p)
        # Scores in float32 may differ in every bit.
        grain = tl.where(lifted > float("-inf"), 0, GRAIN).to(tl.int64)
        if (top_k > 0) & (top_k < vocab):
            # There are k scores from here on: one at least of each group, or of each lane.
            low = tl.where(top_k <= BLOCK, tl.min(largest, 0), float("-inf"))
            groups = tl.max(tl.reshape(largest, [GROUPS, BLOCK // GROUPS]), 1)
            low = tl.where(top_k <= GROUPS, tl.min(groups, 0), low)
            low = tl.maximum(low, cut)
            target = top_k.to(tl.float32)
            cut = tl.maximum(cut, _bound(place, extra, vocab, peak, rate, low, target, grain, False, BLOCK))
        if top_p < 1.0:
            total, _1, _2 = _above(place, extra, vocab, peak, rate, cut, peak, peak, True, BLOCK)
            # All scores below weigh less than half of what may go.
            low = peak + temperature * tl.log((1.0 - top_p) * total * 0.5 / vocab)
            low = tl.maximum(low, cut)
            target = top_p * total
            cut = tl.maximum(cut, _bound(place, extra, vocab, peak, rate, low, target, grain, True, BLOCK))
        cut = tl.minimum(cut, peak)
    return cut


@kernel
def _shape(
    logits: tl.tensor, lifted: tl.tensor, counts: tl.tensor, tokens: tl.tensor, temperatures: tl.tensor,
    seeds: tl.tensor, positions: tl.tensor, top_ps: tl.tensor, top_ks: tl.tensor, min_ps: tl.tensor, cuts: tl.tensor,
    best: tl.tensor, best_token: tl.tensor, stride: tl.tensor, vocab: tl.tensor, parts: tl.tensor,
    ENTRIES: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, QUARTER: tl.constexpr,
    ROUNDS: tl.constexpr, APPROXIMATE: tl.constexpr,
) -> None:  # fmt: skip
    """Where a row is cut, and the best of its lifted tokens: one more part beside those of its other tokens."""
    row = tl.program_id(0)
    entry = tl.arange(0, ENTRIES)
    extra = tl.load(lifted + row * ENTRIES + entry)
    temperature = tl.load(temperatures + row)
    top_p = tl.load(top_ps + row)
    top_k = tl.load(top_ks + row)
    min_p = tl.load(min_ps + row)
    cut = float("-inf")
    if (temperature > 0.0) & ((top_p < 1.0) | (top_k > 0) | (min_p > 0.0)):
        place = logits + row.to(tl.int64) * stride
        cut = _cut(place, extra, vocab, temperature, top_p, top_k, min_p, GRAIN, BLOCK, GROUPS)
    tl.store(cuts + row, cut)

    inside = entry < tl.load(counts + row)
    token = tl.load(tokens + row * ENTRIES + entry, mask=inside, other=0)
    x = tl.where(extra >= cut, extra, float("-inf"))
    if temperature > 0.0:
        # The noise that the token has where it is not lifted.
        quarter = (token // QUARTER) % 4
        counter = token // (4 * QUARTER) * QUARTER + token % QUARTER
        zero = counter * 0
        position = tl.load(positions + row)
        c1 = zero + position.to(tl.int32)
        c2 = zero + (position >> 32).to(tl.int32)
        b0, b1, b2, b3 = tl.philox(tl.load(seeds + row), counter, c1, c2, zero, ROUNDS)
        low = tl.where(quarter == 0, b0, b1)
        high = tl.where(quarter == 2, b2, b3)
        x = x * (1.0 / temperature) + gumbel(tl.where(quarter < 2, low, high), APPROXIMATE)
    value = tl.max(x, 0)
    first = tl.min(tl.where((x == value) & inside, token, vocab - 1), 0)
    tl.store(best + row * parts + parts - 1, value)
    tl.store(best_token + row * parts + parts - 1, tl.minimum(first, vocab - 1))


@dataclass(frozen=True)
class Left:
    """What could be drawn."""

    cuts: Tensor
    """float32 [S]: scores from here on; -inf: all"""
    lifted: Tensor
    """float32 [S, E]: the scores of the entries' tokens; -inf also where there is no entry"""


def sample_shaped(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, shapes: RowShapes, out: Tensor
) -> Left:
    """Choose a token for each row as `sample` does, of what the row's shape leaves. Can be captured in a CUDA graph.

    Biases and bans come first; then, over logit / temperature: min_p, top_k, top_p. A row of temperature 0 takes the
    largest of what the bans leave. A row without a shape gives the token that `sample` gives.

    Args:
        logits: as of `sample`; the scores of biased and banned tokens become -inf.
        temperatures: as of `sample`.
        seeds: as of `sample`.
        positions: as of `sample`.
        shapes: of all rows.
        out: int64 [S].

    Returns:
        What the tokens were drawn from; the other scores stand in `logits`.

    Raises:
        ValueError: the shapes or types do not fit.
    """
    scan = Scan(logits, temperatures, seeds, positions, more=1)
    rows, vocab = logits.shape
    entries = shapes.tokens.shape[1]
    expected = (torch.float32, torch.int32, torch.float32, torch.int32, torch.int32, torch.float32)
    names = ("top_ps", "top_ks", "min_ps", "counts", "tokens", "biases")
    for name, dtype in zip(names, expected, strict=True):
        tensor: Tensor = getattr(shapes, name)
        size = (rows, entries) if tensor.dim() == 2 else (rows,)
        if tensor.dtype != dtype or tuple(tensor.shape) != size or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} of {size}, not {tensor.dtype} {tuple(tensor.shape)}.")
    if entries & (entries - 1):
        raise ValueError(f"Room for {entries} entries is no power of two.")
    lifted = torch.empty(rows, entries, dtype=torch.float32, device=logits.device)
    cuts = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _lift[(rows,)](
        logits, shapes.counts, shapes.tokens, shapes.biases, lifted, logits.stride(0), vocab, entries, num_warps=1
    )
    _shape[(rows,)](
        logits, lifted, shapes.counts, shapes.tokens, temperatures, seeds, positions, shapes.top_ps, shapes.top_ks,
        shapes.min_ps, cuts, scan.best, scan.best_token, logits.stride(0), vocab, scan.parts,
        entries, GRAINS[logits.dtype], BLOCK, GROUPS, QUARTER, ROUNDS, logits.is_cuda, num_warps=WARPS,
    )  # fmt: skip
    scan.choose(cuts, out)
    return Left(cuts, lifted)
