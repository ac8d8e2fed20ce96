"""Repetition, presence and frequency penalties, over only those tokens that have occurred."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from morph_runtime.engine.messages import SamplingParams

FIRST_ROOM = 256
ONCE = np.float32(1)
"""Of the type of the counts: with another one `np.add.at` takes ten times as long."""


class PenaltyState:
    """The distinct tokens of one sequence and how often each stands in the output.

    Grows with the sequence: a step costs its new tokens alone, whatever the length or the vocabulary.
    """

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._seen = 0
        self._ids = np.empty(FIRST_ROOM, dtype=np.int64)
        self._counts = np.zeros(FIRST_ROOM, dtype=np.float32)

    def advance(self, tokens: Sequence[int], prompt_len: int) -> None:
        """Take the tokens that came since the last call (the whole sequence is given, prompt first).

        The first call has a whole prompt to take, and the step loop waits for it: no work on arrays token by token.
        """
        index, begun = self._index, len(self._index)
        distinct = [token for token in dict.fromkeys(tokens[self._seen :]) if token not in index]
        index.update(zip(distinct, range(begun, begun + len(distinct)), strict=True))
        if len(index) > len(self._ids):
            more = max(len(index), 2 * len(self._ids)) - len(self._ids)
            self._ids = np.pad(self._ids, (0, more))
            self._counts = np.pad(self._counts, (0, more))
        self._ids[begun : len(index)] = distinct
        output = tokens[max(self._seen, prompt_len) :]
        np.add.at(self._counts, [index[token] for token in output], ONCE)
        self._seen = len(tokens)

    @property
    def ids(self) -> torch.Tensor:  # [distinct] int64, on the host
        """The distinct tokens of prompt and output."""
        return torch.from_numpy(self._ids[: len(self._index)])

    @property
    def counts(self) -> torch.Tensor:  # [distinct] float32, on the host
        """How often each of `ids` stands in the output."""
        return torch.from_numpy(self._counts[: len(self._index)])


def apply_penalties(
    logits: torch.Tensor,  # [rows, vocab] float32; changed in place
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    states: Sequence[PenaltyState],
) -> None:
    """Penalise the tokens of `rows` as vLLM does.

    A positive logit of any token of prompt or output is divided by `repetition_penalty`, a negative one
    multiplied; then `frequency_penalty` times its count in the output is taken off, and `presence_penalty`
    once if the output holds it.
    """
    vocab = logits.shape[1]
    device = logits.device
    sizes = torch.tensor([len(state.ids) for state in states])
    ids = torch.cat([state.ids for state in states])
    counts = torch.cat([state.counts for state in states])
    places = (torch.tensor(rows).repeat_interleave(sizes) * vocab + ids).to(device)  # [entries]

    def per_entry(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(sizes).to(device)

    repetition = per_entry([p.repetition_penalty for p in params])
    frequency = per_entry([p.frequency_penalty for p in params])
    presence = per_entry([p.presence_penalty for p in params])
    counts = counts.to(device)
    flat = logits.view(-1)
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[places] = values - frequency * counts - presence * (counts > 0)
