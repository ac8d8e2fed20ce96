"""What `morph simulate` runs over one trace: static baselines, modes, sweeps of a setting, and fleets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from morph_runtime.config import MorphSettings
from morph_runtime.errors import ConfigError
from morph_runtime.simulate.arrivals import Arrivals
from morph_runtime.simulate.autoscaler import ScalerSettings
from morph_runtime.simulate.engine_profile import EngineProfile
from morph_runtime.simulate.fleet import Fleet
from morph_runtime.simulate.pilot import SignalPath
from morph_runtime.simulate.result import Interval, Result, bursts, summary, timeline
from morph_runtime.simulate.scenario import Policy, simulate

Say = Callable[[str], None]
AUTO = 0
"""A number of servers: as the autoscaler says."""


@dataclass(frozen=True)
class Study:
    """The question.

    Attributes:
        profile: the engine.
        arrivals: the trace.
        settings: the controller's; the mode is set by `modes`.
        path: how Triton's queue is seen.
        model_error: shares by which the controller's step times are wrong.
        statics: rungs that are served throughout, for comparison.
        modes: of the controller.
        ablation: add each mode without growth of the KV cache, and without a gain in speed.
        sweeps: names of `SWEEPS` and values.
        servers: fleets of so many servers each, `AUTO` for the autoscaler's.
        scaling: the autoscaler's.
    """

    profile: EngineProfile
    arrivals: Arrivals
    settings: MorphSettings = field(default_factory=MorphSettings)
    path: SignalPath = field(default_factory=SignalPath)
    model_error: Sequence[float] = (0.0,)
    statics: Sequence[str] = ("full",)
    modes: Sequence[str] = ("balanced",)
    ablation: bool = False
    sweeps: Sequence[tuple[str, Sequence[float]]] = ()
    servers: Sequence[int] = ()
    scaling: ScalerSettings = field(default_factory=ScalerSettings)

    def static(self, rung: str) -> Policy:
        """A rung from start to end."""
        return Policy(f"static {rung}", self.profile.level_of(rung))

    def mode(self, mode: str) -> Policy:
        """The controller in a mode."""
        settings = replace(self.settings, mode=mode)
        return Policy(mode, None, settings, self.path, self.model_error)

    def policies(self) -> list[Policy]:
        """All that are compared."""
        return [*map(self.static, self.statics), *map(self.mode, self.modes)]


def _slo(study: Study, value: float) -> Study:
    return replace(study, settings=replace(study.settings, ttft_slo_s=value))


def _dwell(study: Study, value: float) -> Study:
    return replace(study, settings=replace(study.settings, dwell_s=value))


def _interval(study: Study, value: float) -> Study:
    return replace(study, settings=replace(study.settings, interval_s=value))


def _error(study: Study, value: float) -> Study:
    return replace(study, model_error=(value,))


def _quantized_error(study: Study, value: float) -> Study:
    return replace(study, model_error=(0.0, *[value] * (len(study.profile.costs.rungs) - 1)))


def _delay(study: Study, value: float) -> Study:
    return replace(study, path=replace(study.path, delay_s=value))


def _rate(study: Study, value: float) -> Study:
    if value <= 0:
        raise ConfigError(f"A sweep's rate must be above 0, but is {value:g}.")
    arrivals = study.arrivals
    return replace(study, arrivals=replace(arrivals, arrival_s=arrivals.arrival_s / value))


SWEEPS: dict[str, Callable[[Study, float], Study]] = {
    "slo": _slo,
    "dwell": _dwell,
    "interval": _interval,
    "error": _error,
    "quantized-error": _quantized_error,
    "delay": _delay,
    "rate": _rate,
}
"""What may be swept: TTFT target, dwell time, decision interval and signal delay in seconds; error of the cost model,
for all rungs or all but full precision, as a share; arrival rate as a factor."""


def run_study(study: Study, say: Say = lambda words: None) -> dict[str, Any]:
    """Run everything; plain values for a JSON file.

    Raises:
        ConfigError: a request does not fit the engine, or a setting is not valid.
    """
    slo_s = study.settings.ttft_slo_s
    full = simulate(study.profile, study.arrivals, study.static("full"))
    busy = bursts(full)
    say(f"{len(busy)} bursts, {sum(b - a for a, b in busy):.1f} s in all")
    return {
        "trace": {"source": study.arrivals.source, "requests": len(study.arrivals), "seconds": study.arrivals.end_s},
        "profile": study.profile.name,
        "rungs": list(study.profile.costs.rungs),
        "layers": study.profile.num_layers,
        "slo_s": slo_s,
        "model_error": list(study.model_error),
        "signal": {"interval_s": study.path.interval_s, "delay_s": study.path.delay_s},
        "bursts": [[a, b] for a, b in busy],
        "runs": [_row(result, slo_s, busy) for result in _runs(study, full, say)],
        "sweeps": [_sweep(study, name, values, say) for name, values in study.sweeps],
        "fleets": list(_fleets(study, say)),
    }


def _runs(study: Study, full: Result, say: Say) -> Iterator[Result]:
    for policy in study.policies():
        say(policy.label)
        yield full if policy.static_level == 0 else simulate(study.profile, study.arrivals, policy)
        if study.ablation and policy.static_level is None:
            for label, profile in (
                ("precision only", study.profile.without_growth()),
                ("growth only", study.profile.without_precision()),
            ):
                say(f"{policy.label}, {label}")
                yield simulate(profile, study.arrivals, replace(policy, label=f"{policy.label}, {label}"))


def _row(result: Result, slo_s: float, busy: Sequence[Interval]) -> dict[str, Any]:
    return {
        **summary(result, slo_s),
        "full_precision_share_outside_bursts": result.full_share(busy),
        "at_level_0_s_after_the_end": _return_s(result),
        "changes": [[round(at, 4), level] for at, level in result.changes],
        "timeline": timeline(result),
        "ttft_by_arrival": np.round([result.arrival_s, result.ttft_s], 4).T.tolist(),
    }


def _return_s(result: Result) -> float | None:
    """Seconds from the end of the last request to level 0; 0 if it was there before, None if it never was."""
    level = result.changes[-1][1] if result.changes else result.initial_level
    if level:
        return None
    return max(0.0, result.changes[-1][0] - result.idle_s) if result.changes else 0.0


def _sweep(study: Study, name: str, values: Sequence[float], say: Say) -> dict[str, Any]:
    rows = []
    for value in values:
        changed = SWEEPS[name](study, value)
        for policy in changed.policies() if name == "rate" else map(changed.mode, changed.modes):
            say(f"{name} {value:g}: {policy.label}")
            result = simulate(changed.profile, changed.arrivals, policy)
            rows.append({name: value, **summary(result, changed.settings.ttft_slo_s)})
    return {"name": name, "rows": rows}


def _fleets(study: Study, say: Say) -> Iterator[dict[str, Any]]:
    for servers in study.servers:
        for policy in study.policies():
            words = "autoscaled" if servers == AUTO else f"{servers} servers"
            say(f"{words}: {policy.label}")
            scaling = study.scaling if servers == AUTO else None
            fleet = Fleet(study.profile, policy, servers or study.scaling.min_replicas, scaling)
            found = fleet.run(study.arrivals).summary(study.settings.ttft_slo_s)
            yield {"servers": "auto" if servers == AUTO else servers, **found}
