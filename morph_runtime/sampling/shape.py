"""What a device may do by itself for a row: truncate what it draws from, bias and ban a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from morph_runtime.sampling.adjust import FORBIDDEN
from morph_runtime.sampling.rows import SamplingRow

MOST_ENTRIES = 32
"""Tokens of a row that may be biased or banned; a row with more is the host's. A power of two."""


@dataclass(frozen=True)
class Entries:
    """Tokens that are biased or banned, each once."""

    tokens: NDArray[np.int32]
    biases: NDArray[np.float32]
    """-inf: banned"""

    @classmethod
    def of(cls, biases: dict[int, float]) -> Entries:
        """Token to bias."""
        return cls(np.array(list(biases), dtype=np.int32), np.array(list(biases.values()), dtype=np.float32))

    def __len__(self) -> int:
        return len(self.tokens)


class RowShape:
    """The biases and bans of one row, as `adjust` applies them; made once, for they change with the length alone.

    Attributes:
        fits: there is room for them.
    """

    __slots__ = ("_early", "_late", "_min_tokens", "fits")

    def __init__(self, row: SamplingRow, eos: Sequence[int]) -> None:
        """`eos`: tokens that end an output; the row has no bad words of several tokens and no penalties."""
        params = row.params
        self._min_tokens = params.min_tokens
        late = dict(params.logit_bias) | {word[-1]: FORBIDDEN for word in params.bad_word_ids}
        early = late | dict.fromkeys((*eos, *params.stop_token_ids), FORBIDDEN) if params.min_tokens else late
        self._early, self._late = Entries.of(early), Entries.of(late)
        # Whatever the length: a request's draws come from one place throughout.
        self.fits = len(early) <= MOST_ENTRIES

    def entries(self, output_len: int) -> Entries:
        """Those in force after so many tokens of output."""
        return self._early if output_len < self._min_tokens else self._late


@dataclass(frozen=True)
class Ways:
    """How the rows of a step come to their tokens; those in neither list are drawn from all tokens, on the device."""

    shaped: dict[int, Entries]
    """By place: the device shapes these first"""
    special: list[int]
    """Places: only the host can sample these"""


def ways(rows: Sequence[SamplingRow], eos: Sequence[int]) -> Ways:
    """Sort the rows of a step. A row's tokens never depend on which others there are."""
    shaped: dict[int, Entries] = {}
    special: list[int] = []
    for at, row in enumerate(rows):
        if row.plain and not row.truncates:
            continue
        if row.scored or row.needs_values:
            special.append(at)
            continue
        shape = row.shape
        if shape is None:
            shape = row.shape = RowShape(row, eos)
        if not shape.fits:
            special.append(at)
            continue
        entries = shape.entries(row.output_len)
        if len(entries) or row.truncates:
            shaped[at] = entries
    return Ways(shaped, special)
