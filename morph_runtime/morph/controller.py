"""The controller: reads the load, asks a rule for a level, keeps the mode's and the operator's caps, and tells why.

With a cost model it decides by forecast (`prediction_rule`), without one by KV capacity alone (`capacity_rule`).
"""

from __future__ import annotations

import json
import logging
import math

from morph_runtime.config import MorphSettings
from morph_runtime.engine.messages import Decision
from morph_runtime.morph.capacity_rule import CapacityRule
from morph_runtime.morph.costs import StepCosts
from morph_runtime.morph.forecast import Forecaster
from morph_runtime.morph.load import Load
from morph_runtime.morph.modes import MODE_TARGETS, Choice
from morph_runtime.morph.prediction_rule import PredictionRule
from morph_runtime.slo import parse_classes


class Controller:
    """Turns a load into a target level. Pure but for its memory: the same readings give the same decisions."""

    def __init__(
        self, settings: MorphSettings, max_level: int, costs: StepCosts | None = None, max_batched_tokens: int = 512
    ) -> None:
        """`costs`: None where none were measured; `max_batched_tokens`: tokens of one step.

        Raises:
            ConfigError: `morph.slo_classes` is not valid.
        """
        self._max_level = max_level
        self._mode = settings.mode
        self._cap = settings.max_level_share
        self.classes = parse_classes(settings.slo_classes, settings.ttft_slo_s, settings.tpot_slo_s)
        self._settings = settings
        self._rule: CapacityRule | PredictionRule = CapacityRule(settings)
        self._warned = False
        if costs is not None:
            self.use_costs(costs, max_batched_tokens)
        self.slo_feasible = True
        """Whether some permitted level was forecast to meet the SLOs at the last decision."""
        self._fresh: list[Decision] = []
        self._last_hold = ""
        self._heading: int | None = None
        self.counts: dict[str, int] = {}

    @property
    def mode(self) -> str:
        """The mode in force."""
        return self._mode

    @property
    def cap(self) -> float:
        """The share of the levels that may be used, besides the mode's own."""
        return self._cap

    @property
    def deepest(self) -> int:
        """The deepest level that may be used now."""
        return math.floor(min(self._cap, MODE_TARGETS[self._mode].deepest) * self._max_level + 0.5)

    def set_mode(self, mode: str = "", cap: float | None = None) -> None:
        """Change the mode, the cap, or both. Raises KeyError for an unknown mode."""
        if mode:
            MODE_TARGETS[mode]
            self._mode = mode
        if cap is not None:
            self._cap = cap

    def use_costs(self, costs: StepCosts, max_batched_tokens: int) -> None:
        """Decide by forecast from now on."""
        self._rule = PredictionRule(self._settings, Forecaster(costs, self.classes, max_batched_tokens))

    @property
    def has_costs(self) -> bool:
        """Whether it decides by forecast."""
        return isinstance(self._rule, PredictionRule)

    @property
    def pause_s(self) -> float:
        """Seconds after a decision for which another load would not be looked at."""
        return self._rule.pause_s

    def decide(self, load: Load) -> int:
        """The level to go to. A decision is logged and counted with its reason; where the rule wants to see no more
        than it has seen a moment ago, the level stays as it is."""
        mode, deepest = MODE_TARGETS[self._mode], self.deepest
        if not (self.has_costs or self._warned):
            self._warned = True
            logging.getLogger(__name__).warning(
                "there is no cost model: levels are chosen by KV capacity alone, not by what they do to latency"
            )
        if load.level > deepest:
            choice = Choice(deepest, "mode" if deepest == round(mode.deepest * self._max_level) else "cap")
        elif deepest == 0:
            choice = Choice(0, "mode" if self._mode == "off" else "cap")
        else:
            choice = self._rule.choose(load, mode, deepest)
            if choice.held:
                return choice.target
        self.slo_feasible = choice.met  # nothing is said against it where no level may be used
        self._record(load, choice)
        return choice.target

    def take_decisions(self) -> list[Decision]:
        """Decisions other than repeated holds since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def _record(self, load: Load, choice: Choice) -> None:
        target = choice.target
        action = "hold" if target == load.level else ("down" if target > load.level else "up")
        heading = None if action == "hold" else target
        if heading is not None and heading == self._heading:
            return  # on the way there: no new decision
        self._heading = heading
        key = f"{action}/{choice.reason}"
        self.counts[key] = self.counts.get(key, 0) + 1
        if action == "hold" and choice.reason == self._last_hold:
            return
        self._last_hold = choice.reason if action == "hold" else ""
        decision = Decision(
            at_s=load.now_s, action=action, reason=choice.reason, level_from=load.level, level_to=target,
            inputs=load.as_inputs(), considered=choice.considered, met=choice.met,
        )  # fmt: skip
        self._fresh.append(decision)
        level = logging.DEBUG if action == "hold" else logging.INFO
        logging.getLogger(__name__).log(
            level, "%s %d -> %d (%s) %s", action, load.level, target, choice.reason, json.dumps(decision.inputs)
        )
