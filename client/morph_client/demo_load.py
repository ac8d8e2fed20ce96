"""The load of ``morph demo``: quiet, a burst, quiet again. Seeded, so that both runs get the same requests."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from morph_client.errors import BadInput
from morph_client.traces import TraceRequest

LOW_SHARE = 0.25
HIGH_SHARE = 1.3
"""Arrival rates in the quiet phases and in the burst, as shares of what full precision serves."""


@dataclass(frozen=True)
class Phase:
    """A stretch of Poisson arrivals."""

    name: str
    seconds: float
    rate_per_s: float


@dataclass(frozen=True)
class PhaseSpan:
    """Where a phase lies, in seconds from the start of the run."""

    name: str
    start_s: float
    end_s: float
    busy: bool
    """True for the burst."""


@dataclass(frozen=True)
class DemoLoad:
    """Low, high, low: seconds, requests per second, and ranges of tokens to draw lengths from."""

    low_before_s: float = 12.0
    high_s: float = 18.0
    low_after_s: float = 25.0
    low_rate_per_s: float = 0.8
    high_rate_per_s: float = 6.0
    prompt_tokens: tuple[int, int] = (120, 360)
    output_tokens: tuple[int, int] = (40, 96)
    seed: int = 7
    kv_tokens: int = 2048
    """KV cache of both servers at full precision, in tokens: small, so that a burst of this size fills it."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The three phases in order."""
        return (
            Phase("quiet", self.low_before_s, self.low_rate_per_s),
            Phase("burst", self.high_s, self.high_rate_per_s),
            Phase("quiet again", self.low_after_s, self.low_rate_per_s),
        )

    @property
    def seconds(self) -> float:
        """Length of the whole load."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def spans(self) -> tuple[PhaseSpan, ...]:
        """Where the phases lie."""
        spans, start = [], 0.0
        for phase in self.phases:
            spans.append(PhaseSpan(phase.name, start, start + phase.seconds, phase.name == "burst"))
            start += phase.seconds
        return tuple(spans)

    def server_environment(self, user: Mapping[str, str]) -> dict[str, str]:
        """The environment to start the server in, given the user's own, which wins."""
        return {"MORPH_KV_TOKENS": str(self.kv_tokens), **user}

    def for_machine(self, capacity_per_s: float) -> DemoLoad:
        """The same load with rates for a machine that serves ``capacity_per_s`` of its requests at full precision.

        The burst asks for 30 % more than that: more than full precision can serve, and about what the KV cache that
        quantized layers free can.
        """
        return replace(
            self,
            low_rate_per_s=round(LOW_SHARE * capacity_per_s, 2),
            high_rate_per_s=round(HIGH_SHARE * capacity_per_s, 2),
        )

    def lasting(self, seconds: float) -> DemoLoad:
        """The same load stretched or cut to ``seconds``. Raises :class:`BadInput` below 3 seconds."""
        if not (math.isfinite(seconds) and seconds >= 3):
            raise BadInput(f"the demo needs at least 3 seconds of load, not {seconds:g}")
        factor = seconds / self.seconds
        return replace(
            self,
            low_before_s=self.low_before_s * factor,
            high_s=self.high_s * factor,
            low_after_s=self.low_after_s * factor,
        )

    def requests(self) -> tuple[TraceRequest, ...]:
        """The arrivals with their lengths. At least one."""
        draw = random.Random(self.seed)
        found = []
        for phase, span in zip(self.phases, self.spans, strict=True):
            at = span.start_s + draw.expovariate(phase.rate_per_s)
            while at < span.end_s:
                found.append(TraceRequest(at, draw.randint(*self.prompt_tokens), draw.randint(*self.output_tokens)))
                at += draw.expovariate(phase.rate_per_s)
        return tuple(found) or (TraceRequest(0.0, self.prompt_tokens[0], self.output_tokens[0]),)


def quick_load() -> DemoLoad:
    """A shorter load, for ``--quick``."""
    return DemoLoad(low_before_s=5.0, high_s=9.0, low_after_s=11.0)
