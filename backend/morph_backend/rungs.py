"""What share of a token's layers ran at which rung, by level."""

from __future__ import annotations

from collections.abc import Sequence

RUNGS = ("full", "w8", "w4")
RUNG_OF_BITS = {16: "full", 8: "w8", 4: "w4"}


class RungShares:
    """The shares of full precision, W8 and W4 at each level of a model.

    Level k walks all layers to the ladder's first rung, one after the other, then to the next.
    """

    def __init__(self, num_layers: int, ladder: Sequence[str]) -> None:
        self._by_level = [
            _shares(level, num_layers, ("full", *ladder)) for level in range(num_layers * len(ladder) + 1)
        ]

    def of(self, level: int) -> tuple[float, float, float]:
        """Shares in the order of `RUNGS`; a level out of range counts as the nearest."""
        return self._by_level[min(max(level, 0), len(self._by_level) - 1)]

    def total(self, levels: Sequence[int]) -> tuple[float, float, float]:
        """The shares of tokens at `levels`, added up: tokens by `RUNGS`."""
        if not levels:
            return 0.0, 0.0, 0.0
        count, first = len(levels), levels[0]
        if levels.count(first) == count:  # nearly always
            full, w8, w4 = self.of(first)
            return count * full, count * w8, count * w4
        each = [self.of(level) for level in levels]
        return sum(one[0] for one in each), sum(one[1] for one in each), sum(one[2] for one in each)


def _shares(level: int, num_layers: int, rungs: Sequence[str]) -> tuple[float, float, float]:
    done, partial = divmod(level, num_layers)
    share = dict.fromkeys(RUNGS, 0.0)
    share[rungs[done]] += (num_layers - partial) / num_layers
    if partial:
        share[rungs[done + 1]] += partial / num_layers
    return share["full"], share["w8"], share["w4"]
