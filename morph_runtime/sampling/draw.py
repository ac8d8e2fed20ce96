"""Drawing tokens: temperature, truncation, and noise that a seed fixes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.sampling.rows import SamplingRow

TEMPORARY_BYTES_PER_SCORE = 56
"""Of a row, for each token of the vocabulary: what `GeneratorDrawer` holds at the most, sorting for top_k and top_p.

The row's copy, its scaled copy, its part with a top_k or top_p, that sorted with the 64-bit places, three more float
tensors and four of booleans, and a reserve.
"""
SEED_MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd 64-bit constant (golden ratio) that spreads neighbouring positions over the seed space."""


class Drawer(Protocol):
    """Draws tokens, as some device does it."""

    def __call__(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        """One token of each row, drawn from what temperature, min_p, top_k and top_p leave (in this order, as in vLLM).

        Takes `TEMPORARY_BYTES_PER_SCORE` for each of the logits, at most.

        Args:
            logits: float32 [rows, vocab], scores after all adjustments; not changed.
            rows: the sequences; a seed and a position give the same noise in any company.
        """
        ...


class GeneratorDrawer:
    """Draws with a generator's noise: of its own for rows with a seed, of one for all others."""

    def __init__(self, device: torch.device, seed: int | None = None) -> None:
        """`seed` is for the rows without one; None: of the system's entropy."""
        self._seeded = torch.Generator(device=device)
        # Torch begins with the same seed in every process: without this, each start would draw the same again.
        entropy = int.from_bytes(os.urandom(8), "big") >> 1
        self._unseeded = torch.Generator(device=device).manual_seed(entropy if seed is None else seed)

    def __call__(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        """See `Drawer`."""
        params = [row.params for row in rows]
        temperature = torch.tensor([p.temperature for p in params], device=logits.device)
        scaled = logits / temperature[:, None]
        _on_rows(scaled, params, lambda p: p.min_p > 0, _keep_likely)
        _on_rows(scaled, params, lambda p: p.top_k > 0 or p.top_p < 1, _keep_top)
        probabilities = scaled.softmax(dim=-1)
        # argmax(p / Exp(1)) is a draw from p (the exponential race); no host synchronisation is needed.
        noise = torch.empty_like(probabilities).exponential_(generator=self._unseeded)
        for at, row in enumerate(rows):
            if row.params.seed is not None:
                seed = _mixed(row.params.seed, row.output_len)
                noise[at].exponential_(generator=self._seeded.manual_seed(seed))
        result: list[int] = probabilities.div_(noise.clamp_(min=1e-30)).argmax(dim=-1).tolist()
        return result


def _mixed(seed: int, position: int) -> int:
    """The generator's seed for one position: depends on nothing else, so neither batch nor preemption matters."""
    return (seed * 0x2545F4914F6CDD1D + (position + 1) * SEED_MULTIPLIER) & (2**63 - 1)


def _on_rows(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    uses: Callable[[SamplingParams], bool],
    change: Callable[[torch.Tensor, Sequence[SamplingParams]], torch.Tensor],
) -> None:
    """Apply `change` to the rows that use it, in place."""
    which = [i for i, p in enumerate(params) if uses(p)]
    if len(which) == len(params):
        logits.copy_(change(logits, params))
    elif which:
        at = torch.tensor(which, device=logits.device)
        logits[at] = change(logits[at], [params[i] for i in which])


def _keep_likely(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:  # [rows, vocab] float32
    """Everything below min_p times the greatest probability set to minus infinity."""
    floor = torch.tensor([p.min_p for p in params], device=logits.device).log()
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + floor[:, None], float("-inf"))


def _keep_top(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:  # [rows, vocab] float32
    """Everything outside each row's top_k and top_p set to minus infinity (the most likely stays)."""
    vocab = logits.shape[-1]
    ordered, index = logits.sort(dim=-1, descending=True)
    k = torch.tensor([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params], device=logits.device)
    p = torch.tensor([q.top_p for q in params], device=logits.device)
    outside = torch.arange(vocab, device=logits.device)[None, :] >= k[:, None]
    ordered = ordered.masked_fill(outside, float("-inf"))
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    beyond = (before >= p[:, None]) & (before > 0) & (p < 1)[:, None]
    ordered = ordered.masked_fill(beyond, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, index, ordered)
