"""What the penalties know of a sequence is what counting it token by token gives, in whatever pieces it comes."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from morph_runtime.sampling.penalties import FIRST_ROOM, PenaltyState

TOKENS = st.integers(0, 3 * FIRST_ROOM)


def counted(tokens: list[int], prompt_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct tokens in the order of their first occurrence, and how often each stands in the output."""
    counts: dict[int, float] = {}
    for position, token in enumerate(tokens):
        counts[token] = counts.get(token, 0.0) + (position >= prompt_len)
    return torch.tensor(list(counts), dtype=torch.int64), torch.tensor(list(counts.values()), dtype=torch.float32)


@given(
    prompt=st.lists(TOKENS, max_size=700),
    resumed=st.lists(TOKENS, max_size=700),
    pieces=st.lists(st.lists(TOKENS, max_size=3), max_size=20),
    scanned=st.integers(0, 700),
)
@example(prompt=list(range(700)), resumed=[3, 3, 701], pieces=[[702], [3, 702]], scanned=FIRST_ROOM)
def test_counts_are_those_of_counting_token_by_token(
    prompt: list[int], resumed: list[int], pieces: list[list[int]], scanned: int
) -> None:
    """A resumed request brings its output with its prompt; `scanned`: a first look that ends anywhere in them."""
    state, tokens = PenaltyState(), [*prompt, *resumed]
    state.advance(tokens[:scanned], len(prompt))
    for piece in ([], *pieces):
        tokens += piece
        state.advance(tokens, len(prompt))
        ids, counts = counted(tokens, len(prompt))
        assert state.ids.dtype == ids.dtype and torch.equal(state.ids, ids)
        assert state.counts.dtype == counts.dtype and torch.equal(state.counts, counts)
