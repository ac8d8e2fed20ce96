"""Which tokens the grammars allow next, applied to logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from llguidance import LLExecutor

from morph_runtime.structured.matcher import GrammarMatcher

WORD_BITS = 32


class TokenMasks:
    """Computes the masks of a step, several matchers at a time."""

    def __init__(self, threads: int) -> None:
        """`threads` compute masks; the logits' device does the rest."""
        self._threads = threads
        self._executor: LLExecutor | None = None

    def apply(
        self,
        logits: torch.Tensor,  # [rows, vocab] float32; changed in place
        matchers: Sequence[tuple[int, GrammarMatcher]],
    ) -> torch.Tensor:  # [matchers, vocab] bool
        """Forbid what the grammar of each (row, matcher) does not allow; returns what is allowed."""
        if self._executor is None:
            self._executor = LLExecutor(num_threads=self._threads)
        vocab = logits.shape[1]
        words = -(-vocab // WORD_BITS)
        bits = torch.zeros(len(matchers), words, dtype=torch.int32)  # on the host
        jobs = [(matcher.inner, at) for at, (_, matcher) in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(jobs, bits.data_ptr(), words * (WORD_BITS // 8), len(matchers))
        shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=logits.device)
        spread = (bits.to(logits.device)[:, :, None] >> shifts) & 1  # [matchers, words, 32]
        allowed = spread.bool().view(len(matchers), -1)[:, :vocab]
        rows = torch.tensor([row for row, _ in matchers], device=logits.device)
        logits[rows] = logits[rows].masked_fill(~allowed, float("-inf"))
        return allowed


def rescue(
    logits: torch.Tensor,  # [rows, vocab] float32; changed in place
    rows: Sequence[int],
    allowed: torch.Tensor,  # [len(rows), vocab] bool
) -> None:
    """Where bans (a bad word, `min_tokens`) left none of the tokens that the grammar allows, the grammar wins."""
    at = torch.tensor(rows, device=logits.device)
    dead = logits[at].amax(dim=1) == float("-inf")  # [len(rows)]
    logits[at[dead]] = torch.zeros_like(logits[at[dead]]).masked_fill(~allowed[dead], float("-inf"))
