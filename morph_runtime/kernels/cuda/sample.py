"""Choice of the next tokens on the GPU, without a word from the host: greedy, or by temperature with a seed per row.

A draw is the largest of logit / temperature + Gumbel noise, distributed exactly as softmax(logits / temperature)
(Gumbel 1954). The noise of a token is a function of (seed, position, token) alone, through the counter-based generator
Philox4x32 (Salmon et al. 2011, who find 7 rounds enough to pass BigCrush): the rest of the batch and padding do not
matter.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from morph_runtime.kernels.cuda.jit import kernel, kernel_with_varying, power_of_two

QUARTER = 512
"""A program takes four runs of so many tokens: a counter of Philox gives four numbers. Part of what a seed draws."""
ROUNDS = 7


@kernel
def _log2(x: tl.tensor, APPROXIMATE: tl.constexpr) -> tl.tensor:
    if APPROXIMATE:  # one instruction, off by 2^-22 at most (PTX ISA)
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@kernel
def gumbel(bits: tl.tensor, APPROXIMATE: tl.constexpr) -> tl.tensor:
    """-log(E) with E exponential, from 32 random bits; fine steps where E is small, since that is what wins."""
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)  # bits * 2^-32, below 1
    # -log(1 - u): for small u, where 1 - u in float32 has lost its digits, a series.
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.3333333))
    exponential = tl.where(uniform < 0.01, series, -0.6931471805599453 * _log2(1.0 - uniform, APPROXIMATE))
    return -0.6931471805599453 * _log2(exponential, APPROXIMATE)


@kernel
def _better(
    value: tl.tensor, token: tl.tensor, other: tl.tensor, other_token: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The larger; of equals, the first token."""
    wins = (value > other) | ((value == other) & (token < other_token))
    return tl.where(wins, value, other), tl.where(wins, token, other_token)


@kernel_with_varying(["stride"])
def _scan(
    logits: tl.tensor,
    temperatures: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    best: tl.tensor,
    best_token: tl.tensor,
    cuts: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    parts: tl.tensor,
    QUARTER: tl.constexpr,
    ROUNDS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    CUT: tl.constexpr,
) -> None:
    """The best token of a part of a row; with CUT, of those that reach the row's cut."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    lane = tl.arange(0, QUARTER)
    start = part * 4 * QUARTER
    place = logits + row.to(tl.int64) * stride
    temperature = tl.load(temperatures + row)
    t0 = start + lane
    t1 = t0 + QUARTER
    t2 = t1 + QUARTER
    t3 = t2 + QUARTER
    x0 = tl.load(place + t0, mask=t0 < vocab, other=float("-inf")).to(tl.float32)
    x1 = tl.load(place + t1, mask=t1 < vocab, other=float("-inf")).to(tl.float32)
    x2 = tl.load(place + t2, mask=t2 < vocab, other=float("-inf")).to(tl.float32)
    x3 = tl.load(place + t3, mask=t3 < vocab, other=float("-inf")).to(tl.float32)
    if CUT:
        cut = tl.load(cuts + row)
        x0 = tl.where(x0 >= cut, x0, float("-inf"))
        x1 = tl.where(x1 >= cut, x1, float("-inf"))
        x2 = tl.where(x2 >= cut, x2, float("-inf"))
        x3 = tl.where(x3 >= cut, x3, float("-inf"))
    if temperature > 0.0:
        seed = tl.load(seeds + row)
        position = tl.load(positions + row)
        counter = part * QUARTER + lane
        zero = counter * 0
        colder = 1.0 / temperature
        c1 = zero + position.to(tl.int32)  # the lower half
        c2 = zero + (position >> 32).to(tl.int32)
        b0, b1, b2, b3 = tl.philox(seed, counter, c1, c2, zero, ROUNDS)
        x0 = x0 * colder + gumbel(b0, APPROXIMATE)
        x1 = x1 * colder + gumbel(b1, APPROXIMATE)
        x2 = x2 * colder + gumbel(b2, APPROXIMATE)
        x3 = x3 * colder + gumbel(b3, APPROXIMATE)
    # What is not a number is as bad as -inf.
    x0 = tl.where(x0 == x0, x0, float("-inf"))
    x1 = tl.where(x1 == x1, x1, float("-inf"))
    x2 = tl.where(x2 == x2, x2, float("-inf"))
    x3 = tl.where(x3 == x3, x3, float("-inf"))
    x0, t0 = _better(x0, t0, x1, t1)
    x2, t2 = _better(x2, t2, x3, t3)
    x0, t0 = _better(x0, t0, x2, t2)
    value = tl.max(x0, 0)
    token = tl.min(tl.where(x0 == value, t0, vocab - 1), 0)
    tl.store(best + row * parts + part, value)
    tl.store(best_token + row * parts + part, tl.minimum(token, vocab - 1))


@kernel_with_varying(["parts"])
def _choose(best: tl.tensor, best_token: tl.tensor, out: tl.tensor, parts: tl.tensor, PARTS: tl.constexpr) -> None:
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    inside = part < parts
    value = tl.load(best + row * parts + part, mask=inside, other=float("-inf"))
    token = tl.load(best_token + row * parts + part, mask=inside, other=0x7FFFFFFF)
    tl.store(out + row, tl.min(tl.where(value == tl.max(value, 0), token, 0x7FFFFFFF), 0).to(tl.int64))


class Scan:
    """The two kernels that choose: the best of each part of a row, and the best of these."""

    def __init__(self, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, more: int = 0) -> None:
        """Arguments and errors as of `sample`; `more` parts of each row, the last ones, are filled by someone else."""
        rows, vocab = logits.shape
        if logits.stride(1) != 1:
            raise ValueError(f"Logits have strides {logits.stride()}: rows must be contiguous.")
        if min(len(temperatures), len(seeds), len(positions)) < rows:
            raise ValueError(f"{rows} rows of logits need as many temperatures, seeds and positions.")
        if (temperatures.dtype, seeds.dtype, positions.dtype) != (torch.float32, torch.int64, torch.int64):
            raise ValueError("Temperatures must be float32, seeds and positions int64.")
        self._logits, self._draws = logits, (temperatures, seeds, positions)
        self._own = -(-vocab // (4 * QUARTER))
        self.parts = self._own + more
        self.best = torch.empty(rows, self.parts, dtype=torch.float32, device=logits.device)
        """The largest score of each part, with its noise"""
        self.best_token = torch.empty(rows, self.parts, dtype=torch.int32, device=logits.device)

    def choose(self, cuts: Tensor | None, out: Tensor) -> None:
        """Into `out` (int64 [S]); of scores below a row's cut (float32 [S]) none is chosen."""
        logits, (rows, vocab) = self._logits, self._logits.shape
        _scan[(rows, self._own)](
            logits, *self._draws, self.best, self.best_token, self.best if cuts is None else cuts, logits.stride(0),
            vocab, self.parts, QUARTER, ROUNDS, logits.is_cuda, cuts is not None, num_warps=4,
        )  # fmt: skip
        _choose[(rows,)](self.best, self.best_token, out, self.parts, power_of_two(self.parts), num_warps=1)


def sample(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, out: Tensor | None = None) -> Tensor:
    """Choose a token for each row. Can be captured in a CUDA graph.

    Args:
        logits: [S, vocab], float32, bfloat16 or float16; rows contiguous. NaN counts as -inf.
        temperatures: float32 [S]; 0: the largest logit, the first of equals.
        seeds: int64 [S].
        positions: int64 [S]: where in its sequence the token will stand; with the seed, it names the draw.
        out: int64 [S]; None: a new one.

    Returns:
        `out`.

    Raises:
        ValueError: the shapes or types do not fit.
    """
    scan = Scan(logits, temperatures, seeds, positions)
    if out is None:
        out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    scan.choose(None, out)
    return out
