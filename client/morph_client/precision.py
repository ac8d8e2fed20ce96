"""At which precision output tokens were computed, second by second."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from morph_client.types import Chunk, RungShare

_NOTHING = RungShare(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class TokenBin:
    """The output tokens that came within one second."""

    at_s: float
    """Start of the second, from the start of the run."""
    tokens: int
    level0: int
    """Of these, computed with every layer at full precision."""
    rungs: RungShare
    """Tokens (not shares) by rung, weighted by layer; they sum to ``tokens``."""


class PrecisionClock:
    """Sorts tokens into seconds. The server tells shares of all tokens of a request so far; this takes them apart."""

    def __init__(self) -> None:
        self._bins: dict[int, TokenBin] = {}
        self.by_level: Counter[int] = Counter()
        """All tokens by the level at which they were computed."""

    def add(self, at_s: float, chunk: Chunk, before: RungShare | None, tokens_before: int) -> None:
        """Books a chunk that arrived at ``at_s``; ``before`` are the shares of the ``tokens_before`` ahead of it.

        A chunk of a server that does not tell shares is left out.
        """
        self.by_level.update(chunk.levels)
        if chunk.rung_share is None or not chunk.tokens:
            return
        second = math.floor(at_s)
        old = self._bins.get(second) or TokenBin(float(second), 0, 0, _NOTHING)
        ahead, now, total = before or _NOTHING, chunk.rung_share, tokens_before + chunk.tokens
        new = {
            name: getattr(old.rungs, name) + max(0.0, getattr(now, name) * total - getattr(ahead, name) * tokens_before)
            for name in ("full", "w8", "w4")
        }
        self._bins[second] = TokenBin(
            old.at_s, old.tokens + chunk.tokens, old.level0 + chunk.levels.count(0), RungShare(**new)
        )

    def bins(self) -> list[TokenBin]:
        """The seconds in which tokens came, in order."""
        return [self._bins[second] for second in sorted(self._bins)]
