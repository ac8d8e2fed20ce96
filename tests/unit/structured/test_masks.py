"""Masks of token grammars are the same however many are made at a time."""

from __future__ import annotations

import pytest
import torch

from morph_runtime.structured.masks import TokenMasks, rescue

VOCAB, ROWS = 70, 5


class OneWord:
    """Stands in for the library's executor: matcher `n` allows the tokens that `n` divides."""

    def unsafe_compute_mask_ptr(self, jobs: list[tuple[int, int]], address: int, row_bytes: int, _count: int) -> None:
        import ctypes

        for number, at in jobs:
            for token in range(0, VOCAB, number):
                byte = ctypes.c_uint8.from_address(address + at * row_bytes + token // 8)
                byte.value |= 1 << token % 8


class Matcher:
    def __init__(self, number: int) -> None:
        self.inner = number


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_a_mask_forbids_what_its_grammar_does_not_allow_and_nothing_else(chunk: int) -> None:
    masks = TokenMasks(1)
    masks._executor = OneWord()  # type: ignore[assignment]
    logits = torch.arange(ROWS * VOCAB, dtype=torch.float32).view(ROWS, VOCAB)
    before, matchers = logits.clone(), [(4, Matcher(3)), (0, Matcher(7)), (2, Matcher(33))]
    allowed = masks.apply(logits, matchers, chunk)  # type: ignore[arg-type]
    for at, (row, matcher) in enumerate(matchers):
        wanted = torch.arange(VOCAB) % matcher.inner == 0
        assert torch.equal(allowed[at], wanted)
        assert torch.equal(logits[row], before[row].masked_fill(~wanted, float("-inf")))
    assert torch.equal(logits[[1, 3]], before[[1, 3]]), "rows without a grammar stay as they are"


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_only_rows_in_which_nothing_is_left_get_their_grammar_back(chunk: int) -> None:
    allowed = torch.zeros(3, VOCAB, dtype=torch.bool)
    allowed[:, [5, 9]] = True
    logits = torch.full((ROWS, VOCAB), float("-inf"))
    logits[4, 9] = 2.5
    rescue(logits, [0, 4, 3], allowed, chunk)
    for row in (0, 3):
        assert torch.nonzero(logits[row] > float("-inf")).flatten().tolist() == [5, 9]
    assert logits[4].max() == 2.5 and int((logits[4] > float("-inf")).sum()) == 1
    assert bool((logits[[1, 2]] == float("-inf")).all())
