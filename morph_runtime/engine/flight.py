"""A step that runs, and what the engine tells of those that have run."""

from __future__ import annotations

from dataclasses import dataclass, field

from morph_runtime.engine.messages import Finished, TokenDelta
from morph_runtime.engine.runner import Launched
from morph_runtime.scheduler import Request, StepPlan


@dataclass(frozen=True)
class Flight:
    """A step between its launch and its resolution; `sampling` are the requests of its first rows."""

    plan: StepPlan
    sampling: list[Request]
    launched: Launched
    level: int
    began_s: float
    needs_values: bool
    """The step after it cannot be launched before the values that this one samples are known."""
    predicted_s: float
    """Seconds that it should take by the cost model as it was measured; 0: there is none."""


@dataclass
class News:
    """What the next `StepOutput` tells."""

    tokens: list[TokenDelta] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    resolved: bool = False
    """A step has been resolved."""
