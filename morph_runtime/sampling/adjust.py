"""Changes to the logits before a token is chosen, in vLLM's order: bans, minimum length, bias, penalties."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from morph_runtime.sampling.penalties import apply_penalties
from morph_runtime.sampling.rows import SamplingRow

FORBIDDEN = float("-inf")


def adjust(
    logits: torch.Tensor,  # [rows, vocab] float32, contiguous; changed in place
    rows: Sequence[SamplingRow],
    which: Sequence[int],
    eos: Sequence[int],
) -> None:
    """Apply what the rows `which` ask for. The other rows cost nothing."""
    banned_rows, banned_ids = _columns(
        (i, token) for i in which for token in (*_bad_word_ends(rows[i]), *_too_early(rows[i], eos))
    )
    if banned_rows:
        logits[_index(banned_rows, logits), _index(banned_ids, logits)] = FORBIDDEN
    biased = [(i, token, bias) for i in which for token, bias in rows[i].params.logit_bias]
    if biased:
        at = (_index([b[0] for b in biased], logits), _index([b[1] for b in biased], logits))
        logits[at] += torch.tensor([b[2] for b in biased], dtype=logits.dtype, device=logits.device)
    penalised = [(i, state) for i in which if (state := rows[i].penalties) is not None]
    if penalised:
        for i, state in penalised:
            state.advance(rows[i].sequence.tokens, rows[i].sequence.prompt_len)
        places = [i for i, _ in penalised]
        apply_penalties(logits, places, [rows[i].params for i in places], [state for _, state in penalised])


def _bad_word_ends(row: SamplingRow) -> Iterator[int]:
    """The tokens that would complete a bad word after the output so far."""
    for word in row.params.bad_word_ids:
        begun = len(word) - 1
        if begun <= row.output_len and (not begun or tuple(row.sequence.tokens[-begun:]) == word[:-1]):
            yield word[-1]


def _too_early(row: SamplingRow, eos: Sequence[int]) -> Sequence[int]:
    """The tokens that would end the output before `min_tokens`."""
    return (*eos, *row.params.stop_token_ids) if row.output_len < row.params.min_tokens else ()


def _columns(pairs: Iterator[tuple[int, int]]) -> tuple[list[int], list[int]]:
    both = list(pairs)
    return [row for row, _ in both], [token for _, token in both]


def _index(numbers: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)
