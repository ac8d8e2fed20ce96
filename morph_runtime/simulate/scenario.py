"""One simulation: an engine, a trace, and a controller or a fixed level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from morph_runtime.config import MorphSettings
from morph_runtime.errors import ConfigError
from morph_runtime.simulate.arrivals import Arrivals
from morph_runtime.simulate.engine import SimulatedEngine
from morph_runtime.simulate.engine_profile import EngineProfile
from morph_runtime.simulate.pilot import Pilot, SignalPath
from morph_runtime.simulate.result import Result, result_of

RETURN_S = 120.0
"""After the last request, the time in which the level may come back."""


@dataclass(frozen=True)
class Policy:
    """Who chooses the level.

    Attributes:
        label: what a report calls it.
        static_level: the level throughout; None: the controller chooses.
        settings: the controller's.
        path: how Triton's queue is seen.
        model_error: shares by which the controller's step times are wrong, one for all rungs or one each.
        has_costs: whether it has a cost model at all.
    """

    label: str
    static_level: int | None = None
    settings: MorphSettings = field(default_factory=MorphSettings)
    path: SignalPath = field(default_factory=SignalPath)
    model_error: Sequence[float] = (0.0,)
    has_costs: bool = True

    def build(self, profile: EngineProfile) -> tuple[SimulatedEngine, Pilot | None]:
        """An engine that has served nothing yet, and its pilot."""
        if self.static_level is not None:
            return SimulatedEngine(profile, self.static_level), None
        pilot = Pilot(self.settings, profile.mistaken(self.model_error) if self.has_costs else None, self.path)
        return SimulatedEngine(profile, 0, pilot.decide, self.settings.interval_s), pilot


def check_lengths(profile: EngineProfile, arrivals: Arrivals) -> None:
    """Raises ConfigError if a request is longer than KV at full precision holds: no engine would take it."""
    longest = int((arrivals.prompt_tokens + arrivals.output_tokens).max())
    holds = int(profile.capacities[0]) * profile.block_tokens
    if longest > holds:
        raise ConfigError(
            f"A request of the trace has {longest} tokens, but the profile's KV cache holds {holds} at full precision: "
            "cut prompts or outputs, or use another profile."
        )


def simulate(profile: EngineProfile, arrivals: Arrivals, policy: Policy) -> Result:
    """Serve a trace to its end, and then until the level is back at 0 or `RETURN_S` is over.

    Raises:
        ConfigError: a request does not fit the engine.
    """
    check_lengths(profile, arrivals)
    engine, pilot = policy.build(profile)
    columns = (arrivals.arrival_s.tolist(), arrivals.prompt_tokens.tolist(), arrivals.output_tokens.tolist())
    for at_s, prompt, output in zip(*columns, strict=True):
        engine.submit(at_s, prompt, output)
    while engine.unfinished:
        engine.run_until(engine.now_s + RETURN_S)
    if pilot is not None:
        engine.run_until(max(engine.records.last_s) + RETURN_S)
    return result_of(engine, policy.label, policy.static_level or 0, pilot.counts if pilot else None)
