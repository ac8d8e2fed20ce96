"""The rule with a cost model: the least degradation whose forecast meets the SLOs.

Down: if the present level is not forecast to meet them, the mildest one that is, with a margin, for more requests than
come. If none is, the mildest one that has nearly all of what can be gained, and none at all if nothing can. While
nothing waits and blocks suffice, a burst is expected to pass; once that has ended it is expected to last, for a level
that is gone to late has a backlog to serve that no level serves at once. Up: a milder level must be forecast to meet
them with the same margin, throughout a dwell time, and live KV must fit it. A step down soon after a step up was a
mistake: the margin grows with each, and shrinks with time.
"""

from __future__ import annotations

import math

import numpy as np

from morph_runtime.config import MorphSettings
from morph_runtime.engine.messages import Considered
from morph_runtime.morph.estimates import FAST_S
from morph_runtime.morph.forecast import Forecast, Forecaster, Futures
from morph_runtime.morph.load import Floats, Load
from morph_runtime.morph.modes import Choice, ModeTargets

MET = 0.002
"""A score up to this counts as meeting the SLOs."""
LEAST_GAIN, LEAST_SCORE = 0.1, 0.02
"""What a step must take away of the score to be worth it: a share of it; and below level 0 so much (overruns of 2 %),
for the last few late requests of a burst are not worth what a rung that is slow at prefill costs the others."""
NO_LOSS = 0.02
"""Share by which the score may grow where degradation does not help and is taken back."""
LOOK_S, CALM_S = 0.1, 0.25
"""Least time between two forecasts; the second at level 0 while nothing waits outside the engine, and after `SAME`
decisions to hold for the same reason."""
SAME = 5
REGRET_S, CAUTION, MOST_CAUTION, FORGET_S = 30.0, 0.25, 1.0, 90.0
"""A down-shift within REGRET_S of an up-shift adds CAUTION to the factor on arrivals; it fades over FORGET_S."""
PART_WAY, SETTLED_S = 3.0, 61.0
"""Dwell times for an up-shift that does not reach level 0, and the least time since the last down-shift: a load that
stays moves about, and to follow it would turn the level back and forth."""

BURST = 3.0
"""Standard deviations by which the arrival rate must exceed its mean to be a burst beyond doubt."""

View = tuple[float, bool, float]
"""A factor on the arrivals, whether a burst lasts, and the share of each target that counts as meeting it; up to the
mode's own bound where a request by itself takes longer."""


class PredictionRule:
    """Pure but for its memory: the same readings give the same choices."""

    def __init__(self, settings: MorphSettings, forecaster: Forecaster) -> None:
        self._settings = settings
        self._forecaster = forecaster
        self._late_since: float | None = None
        self._unfit_s = np.full(forecaster.costs.max_level + 1, -math.inf)
        """When each level was last not fit to be gone back to."""
        self._last_up_s = self._last_down_s = -math.inf
        self._caution = 0.0
        self._caution_s = 0.0
        self._next_s = -math.inf
        self.pause_s = 0.0
        """Seconds for which it wants to see no other load."""
        self._last_reason = ""
        self._holds = 0

    def choose(self, load: Load, mode: ModeTargets, deepest: int) -> Choice:
        """The level to go to; none deeper than `deepest`, and the present one is not."""
        # Idle or not, at level 0 with nothing outside the engine there is little to foresee.
        calm = load.level == 0 and load.pending == 0 and load.head_fits and self._late_since is None
        if load.now_s < self._next_s:
            return Choice(load.level, self._last_reason, held=True)
        if calm and not len(load.running) and not load.backlog:
            return Choice(0, "slo_met")
        same = self._holds >= SAME and self._late_since is None
        self.pause_s = CALM_S if calm or same else LOOK_S
        self._next_s = load.now_s + self.pause_s
        choice = self._weigh(load, mode, deepest)
        holds = choice.target == load.level and choice.reason == self._last_reason
        self._holds = self._holds + 1 if holds else 0
        self._last_reason = choice.reason
        if choice.reason == "persistence":  # it is looked at again soon
            self.pause_s = min(self.pause_s, LOOK_S)
            self._next_s = load.now_s + self.pause_s
        if choice.target > load.level:
            if load.now_s - self._last_up_s < REGRET_S:
                self._caution = min(MOST_CAUTION, self._faded(load.now_s) + CAUTION)
                self._caution_s = load.now_s
            self._unfit_s[:] = load.now_s
            self._last_down_s = load.now_s
        elif choice.target < load.level:
            self._last_up_s = load.now_s
        return choice

    def _forecasts(self, load: Load, mode: ModeTargets, deepest: int, *views: View) -> list[Forecast]:
        """What comes of each level, in each of the views."""
        count = deepest + 1
        more, lasting, bound = zip(*views, strict=True)
        levels = np.tile(np.arange(count), len(views))
        futures = Futures(
            levels, np.repeat(more, count), np.repeat(lasting, count), np.repeat(bound, count),
            np.full(len(levels), mode.bound),
        )  # fmt: skip
        forecast = self._forecaster.forecast(load, futures)
        return [forecast.part(first, first + count) for first in range(0, len(levels), count)]

    def _weigh(self, load: Load, mode: ModeTargets, deepest: int) -> Choice:
        # Arrivals are counted over a few seconds, so a steady load looks like more or less than it is by `doubt`, a
        # standard deviation. A rate far above the mean is a burst; of one near it, no more is believed than is sure.
        fast, mean = max(load.arrivals_per_s, 1e-9), load.mean_arrivals_per_s
        doubt = 1 / math.sqrt(max(1.0, 2 * FAST_S * fast))
        burst = fast - mean > BURST * math.sqrt(mean / (2 * FAST_S))
        sure = 1.0 if burst else max(1 - doubt, min(1.0, mean / fast))
        caution = self._faded(load.now_s)
        goal_more, safe_more = ((more + caution) * (1 + doubt) for more in (mode.goal_more, mode.safe_more))
        strained = load.backlog > 0 or load.demand > load.capacities[load.level]
        passes, aim = (1.0, False, mode.bound), (goal_more, True, mode.safe_bound)
        lasts, safely = (sure, True, mode.safe_bound), (safe_more, True, mode.safe_bound)
        # Most of a forecast's time is not for its views, but what is not needed is left out.
        views = [passes, *([lasts, aim] if strained else []), *([safely] if load.level else [])]
        found = self._forecasts(load, mode, deepest, *views)
        here, lasting, safe = found[0], found[1 if strained else 0], found[-1]
        level = load.level
        up, fit = self._way_back(load, mode, safe)
        view = lasting if lasting.score[level] > here.score[level] else here
        score = view.score

        def choice(target: int, reason: str) -> Choice:
            return _choice(target, reason, view, level, deepest, met=bool(here.score.min() <= MET))

        best = float(score.min())
        met = bool(score[level] <= MET)
        least_gain = max(LEAST_SCORE if level else MET, LEAST_GAIN * float(score[level]))
        if met or score[level] - best < least_gain:
            self._late_since = None
            if up is not None:
                return choice(up, "slo_met_at_milder" if met else "no_gain")
            if not met:
                return choice(level, "no_gain")
            return choice(level, "slo_met" if level == 0 else "dwell" if fit else "milder_too_slow")
        self._late_since = load.now_s if self._late_since is None else self._late_since
        if load.now_s - self._late_since < mode.persist_s:
            return choice(level, "persistence")
        # Where to is chosen on the safe side: one step that suffices, and not one after the other.
        goal = found[2] if strained else self._forecasts(load, mode, deepest, aim)[0]
        least = float(goal.score.min())
        enough = max(MET, least + mode.slack * max(0.0, float(goal.score[level]) - least))
        target = int(np.flatnonzero(goal.score <= enough)[0])
        if target == level:
            return choice(level, "no_gain")
        if target < level:
            if load.now_s - self._last_down_s < self._settings.dwell_s or not self._fits(load, mode)[target]:
                return choice(level, "dwell")
            return choice(target, "milder_is_faster")
        return choice(target, "slo_met_at_deeper" if score[target] <= MET else "best_effort")

    def _way_back(self, load: Load, mode: ModeTargets, safe: Forecast) -> tuple[int | None, bool]:
        """The milder level that can be gone back to, if there is one; and whether one is fit but has yet to dwell."""
        level = load.level
        enough = max(MET, safe.score[level] * (1 + NO_LOSS))
        fit = (safe.score[:level] <= enough) & self._fits(load, mode)[:level]
        self._unfit_s[:level][~fit] = load.now_s
        dwelt: Floats = load.now_s - self._unfit_s[:level]
        needed = np.full(level, PART_WAY * self._settings.dwell_s)
        needed[:1] = self._settings.dwell_s
        if load.now_s - self._last_down_s < SETTLED_S:
            needed[1:] = math.inf
        ready = np.flatnonzero(fit & (dwelt >= needed))
        return (int(ready[0]) if len(ready) else None), bool(fit.any())

    def _fits(self, load: Load, mode: ModeTargets) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """By level, whether what is live fits its capacity with the mode's margin, and will as it grows; cached blocks
        make room."""
        result: np.ndarray[tuple[int], np.dtype[np.bool_]] = load.peak <= (1 - mode.up_margin) * load.capacities
        return result

    def _faded(self, now_s: float) -> float:
        return self._caution * math.exp(-(now_s - self._caution_s) / FORGET_S)


def _choice(target: int, reason: str, forecast: Forecast, level: int, deepest: int, met: bool) -> Choice:
    """With what was forecast of full precision, the present level, the target, the best level and the deepest."""
    shown = sorted({0, level, target, int(forecast.score.argmin()), deepest})
    considered = [
        Considered(
            k, round(float(forecast.score[k]), 4), round(float(forecast.late[k]), 3),
            round(float(forecast.ttft_s[k]), 3), round(float(forecast.tpot_s[k]), 4),
        )
        for k in shown
    ]  # fmt: skip
    return Choice(target, reason, considered, met)
