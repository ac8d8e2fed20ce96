"""Predicted against real step times while serving: how much slower or faster the device is now than when measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from morph_runtime.morph.costs import Floats, Numbers, StepCosts

if TYPE_CHECKING:  # the simulator corrects its costs with this, and loads no tensors
    from morph_runtime.models.batch import HostBatch

WEIGHT = 0.05
"""Of a new step in the mean."""
MOST = 0.7
"""Natural logarithm by which a step may differ from the mean and count whole (a factor of 2); beyond, it counts as
this: a page fault or a pause of the process is no news of the device."""
WIDEST = 3.0
"""Bound of the mean's logarithm (a factor of 20)."""


class StepCorrection:
    """Exponential means of log(real / predicted) for the mixes of rungs, and one over all for mixes not seen yet.

    A mix is the number of whole rungs that the level's layers have gone down, rounded: mixtures between two rungs
    are made of the same kernels as these.
    """

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self._layers = int(costs.counts[0].sum())
        self._by_mix: list[float | None] = [None] * len(costs.rungs)
        self._all = 0.0
        self.steps = 0
        """Steps that were seen."""

    def predict(self, level: int, batch: HostBatch) -> float:
        """Seconds of a step by the model as it was measured."""
        contexts, count = batch.contexts, batch.num_sequences
        if batch.all_decodes:
            return self.costs.seconds(level, count, int(contexts.sum()), 0, 0)
        ones = batch.lengths == 1
        lengths, ends = batch.lengths[~ones].astype("int64"), contexts[~ones].astype("int64")
        pairs = int((lengths * (ends - lengths) + lengths * (lengths + 1) // 2).sum())
        decodes = count - len(lengths)
        return self.costs.seconds(level, decodes, int(contexts[ones].sum()), batch.num_tokens - decodes, pairs)

    def observe(self, level: int, predicted_s: float, real_s: float) -> None:
        """A step has run; `predicted_s` is what `predict` said of it."""
        if predicted_s <= 0 or real_s <= 0:
            return
        seen = math.log(real_s / predicted_s)
        mix = self._mix(level)
        known = self._by_mix[mix]
        self._by_mix[mix] = _moved(self._all if known is None else known, seen)
        self._all = _moved(self._all, seen)
        self.steps += 1

    def ratio(self, level: int) -> float:
        """Real over predicted time at a level, lately; 1 before any step."""
        known = self._by_mix[self._mix(level)]
        return math.exp(self._all if known is None else known)

    def step_s(self, level: int, decodes: Numbers, context: Numbers, prefill: Numbers, pairs: Numbers) -> Floats:
        """`StepCosts.step_s` at one level, corrected."""
        return self.costs.step_s(level, decodes, context, prefill, pairs) * self.ratio(level)

    def _mix(self, level: int) -> int:
        return (level + self._layers // 2) // self._layers


def _moved(mean: float, seen: float) -> float:
    step = WEIGHT * max(-MOST, min(MOST, seen - mean))
    return max(-WIDEST, min(WIDEST, mean + step))
