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
        chunk: int,
    ) -> torch.Tensor:  # [matchers, vocab] bool
        """Forbid what the grammar of each (row, matcher) does not allow; returns what is allowed.

        Args:
            logits: changed in place.
            matchers: each with its row.
            chunk: of them at a time: bounds the temporaries, of 9 bytes per score (a draw takes more).
        """
        if self._executor is None:
            self._executor = LLExecutor(num_threads=self._threads)
        vocab = logits.shape[1]
        words = -(-vocab // WORD_BITS)
        bits = torch.zeros(len(matchers), words, dtype=torch.int32)  # on the host
        jobs = [(matcher.inner, at) for at, (_, matcher) in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(jobs, bits.data_ptr(), words * (WORD_BITS // 8), len(matchers))
        shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=logits.device)
        bits = bits.to(logits.device)
        rows = torch.tensor([row for row, _ in matchers], device=logits.device)
        allowed = torch.empty(len(matchers), vocab, dtype=torch.bool, device=logits.device)
        for first in range(0, len(matchers), chunk):
            part, some = rows[first : first + chunk], allowed[first : first + chunk]
            spread = (bits[first : first + chunk, :, None] >> shifts) & 1  # [chunk, words, 32]
            some.copy_(spread.view(len(part), -1)[:, :vocab])
            del spread
            logits[part] = logits[part].masked_fill_(~some, float("-inf"))
        return allowed


def rescue(
    logits: torch.Tensor,  # [rows, vocab] float32; changed in place
    rows: Sequence[int],
    allowed: torch.Tensor,  # [len(rows), vocab] bool
    chunk: int,
) -> None:
    """Where bans (a bad word, `min_tokens`) left none of the tokens that the grammar allows, the grammar wins.

    `chunk` rows at a time.
    """
    index = torch.tensor(rows, device=logits.device)
    for first in range(0, len(rows), chunk):
        at, some = index[first : first + chunk], allowed[first : first + chunk]
        dead = logits[at].amax(dim=1) == float("-inf")  # [chunk]
        logits[at[dead]] = torch.zeros_like(logits[at[dead]]).masked_fill_(~some[dead], float("-inf"))
