"""Levels: a number that fixes the precision of every decoder layer.

A plan is an order of layers and a ladder of rungs. Level 0 is full precision; levels 1..L take the
layers of the order, one by one, to the ladder's first rung; the next L levels take them, in the
same order, to the second. So a model has L * len(ladder) + 1 states instead of 3^L (DESIGN: level).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import RUNG_BITS, Rung


@dataclass(frozen=True)
class Transition:
    """One layer's change between two neighbouring levels."""

    layer: int
    source: Rung
    target: Rung

    @property
    def is_down(self) -> bool:
        """Towards fewer bits."""
        return RUNG_BITS[self.target] < RUNG_BITS[self.source]


class LevelPlan:
    """The states that a model of `num_layers` layers can be in."""

    def __init__(self, order: Sequence[int], ladder: Sequence[Rung]) -> None:
        self.order = tuple(order)
        self.ladder = tuple(ladder)
        self.num_layers = len(self.order)

    @property
    def max_level(self) -> int:
        """The deepest level."""
        return self.num_layers * len(self.ladder)

    def rungs(self, level: int) -> tuple[Rung, ...]:
        """The rung of each layer, by layer number.

        Raises:
            ValueError: `level` is outside 0..max_level.
        """
        if not 0 <= level <= self.max_level:
            raise ValueError(f"level must be between 0 and {self.max_level}, but is {level}")
        done, partial = divmod(level, self.num_layers)
        result: list[Rung] = ["full"] * self.num_layers
        for place, layer in enumerate(self.order):
            steps = done + (1 if place < partial else 0)
            if steps:
                result[layer] = self.ladder[steps - 1]
        return tuple(result)

    def level_of(self, rung: str) -> int:
        """The mildest level at which every layer is at `rung`.

        Raises:
            ValueError: the ladder does not have it.
        """
        return 0 if rung == "full" else self.num_layers * (self.ladder.index(rung) + 1)

    def transition(self, level: int, direction: int) -> Transition:
        """What changes from `level` to `level + direction` (direction is +1 or -1).

        Raises:
            ValueError: one of them is outside 0..max_level.
        """
        milder = min(level, level + direction)
        if not 0 <= milder < self.max_level:
            raise ValueError(f"there is no change between the levels {level} and {level + direction}")
        done, place = divmod(milder, self.num_layers)
        before: Rung = self.ladder[done - 1] if done else "full"
        after = self.ladder[done]
        return Transition(self.order[place], *((before, after) if direction > 0 else (after, before)))


def parse_order(text: str, num_layers: int) -> tuple[int, ...]:
    """The layer order that a setting asks for.

    Raises:
        ConfigError: it is neither a known name nor a permutation of 0..num_layers-1.
    """
    if text in ("auto", "front_to_back"):
        return tuple(range(num_layers))
    if text == "back_to_front":
        return tuple(reversed(range(num_layers)))
    try:
        order = tuple(int(part) for part in text.split(","))
    except ValueError:
        order = ()
    if sorted(order) != list(range(num_layers)):
        raise ConfigError(
            f"morph.order must be auto, front_to_back, back_to_front, an order file (.json), or each of the layers "
            f"0 to {num_layers - 1} once, separated by commas, but is '{text}'."
        )
    return order
