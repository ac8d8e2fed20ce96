"""What steps and shifts cost at every level: the controller's and the simulator's idea of the engine's speed.

A step's time is the sum of what its tokens cost in the layers' linear parts, which depends on the rung of each layer,
and of what attention reads, which does not. Layers of one rung cost the same, so a level between two uniform ones
costs their mean, weighted by the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from morph_runtime.morph.levels import LevelPlan

Floats = NDArray[np.float64]
Numbers = float | int | Floats | NDArray[np.int64]


@dataclass(frozen=True)
class StepCosts:
    """A cost model of one engine on one device; all times in seconds.

    Attributes:
        rungs: names of the rungs, `full` first, then the ladder.
        tokens: numbers of tokens of a step at which the next field holds times, rising from 1; G of them.
        whole_s: float64 [rungs, G], a step with all layers at one rung, with an empty KV cache.
        context_s: per token of KV that decodes read, all decodes together.
        pair_s: per (prompt token, token it attends to) of prefills.
        counts: int [levels, rungs], how many layers of each level are at each rung.
        down_s: one layer down, from the decision to its capacity being published; a walk of n layers takes n times it.
        up_s: one layer up, likewise.
    """

    rungs: tuple[str, ...]
    tokens: Floats
    whole_s: Floats
    context_s: float
    pair_s: float
    counts: NDArray[np.int64]
    down_s: float
    up_s: float

    @property
    def max_level(self) -> int:
        """The deepest level."""
        return len(self.counts) - 1

    def step_s(self, level: Numbers, decodes: Numbers, context: Numbers, prefill: Numbers, pairs: Numbers) -> Floats:
        """Seconds of a step; all arguments broadcast against each other.

        Args:
            level: the level at which it runs.
            decodes: requests that decode a token each.
            context: tokens of KV that they read, all together.
            prefill: prompt tokens, all requests together.
            pairs: sum over these of the tokens each attends to; `pairs_of` gives it.
        """
        count = np.maximum(np.asarray(decodes, dtype=np.float64) + prefill, 1.0)
        curves = np.stack([self._curve(row, count) for row in self.whole_s], axis=-1)
        shares = self.counts[np.asarray(level, dtype=np.int64)] / self.counts[0].sum()
        fixed: Floats = (curves * shares).sum(axis=-1)
        reads: Floats = np.asarray(context) * self.context_s + np.asarray(pairs) * self.pair_s
        return fixed + reads

    def shift_s(self, source: int, target: int) -> float:
        """Seconds from the decision until the engine is at `target`, its capacity published."""
        return (target - source) * self.down_s if target > source else (source - target) * self.up_s

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the model back."""
        return {
            "rungs": list(self.rungs), "tokens": self.tokens.tolist(), "whole_s": self.whole_s.tolist(),
            "context_s": self.context_s, "pair_s": self.pair_s, "down_s": self.down_s, "up_s": self.up_s,
        }  # fmt: skip

    @staticmethod
    def from_json(values: Mapping[str, Any], plan: LevelPlan) -> StepCosts:
        """The model that `to_json` gave, for the levels of a plan.

        Raises:
            KeyError: a field is missing.
            ValueError: its rungs are not those of the plan.
        """
        rungs = tuple(values["rungs"])
        if rungs != ("full", *plan.ladder):
            raise ValueError(f"the costs are of the rungs {', '.join(rungs)}")
        return StepCosts(
            rungs=rungs,
            tokens=np.asarray(values["tokens"], dtype=np.float64),
            whole_s=np.asarray(values["whole_s"], dtype=np.float64),
            context_s=float(values["context_s"]),
            pair_s=float(values["pair_s"]),
            counts=layer_counts(plan),
            down_s=float(values["down_s"]),
            up_s=float(values["up_s"]),
        )

    def _curve(self, times: Floats, count: Floats) -> Floats:
        """Between the measured sizes a straight line; beyond the last one, in proportion to the last stretch."""
        inside: Floats = np.interp(count, self.tokens, times)
        slope = (times[-1] - times[-2]) / (self.tokens[-1] - self.tokens[-2])
        beyond: Floats = np.maximum(count - self.tokens[-1], 0.0) * slope
        return inside + beyond


def layer_counts(plan: LevelPlan) -> NDArray[np.int64]:
    """How many layers are at each rung, int64 [levels, 1 + len(ladder)]."""
    names: Sequence[str] = ("full", *plan.ladder)
    return np.array([[plan.rungs(k).count(n) for n in names] for k in range(plan.max_level + 1)])


def pairs_of(start: int, length: int) -> int:
    """Pairs of a prompt token and a token it attends to, for `length` tokens from position `start` on."""
    return length * start + length * (length + 1) // 2
