"""What a simulation knows of an engine: its costs, its KV capacities and its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from morph_runtime.config import RUNGS
from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import RUNG_BITS
from morph_runtime.morph.costs import StepCosts
from morph_runtime.morph.levels import LevelPlan


@dataclass(frozen=True)
class EngineProfile:
    """One engine on one device.

    Attributes:
        name: what a report calls it.
        costs: step and shift times.
        capacities: int64 [levels], KV blocks at each level.
        num_layers: decoder layers; `costs.rungs` beyond the first is the ladder.
        block_tokens: tokens per KV block.
        max_num_seqs: requests that run at the same time.
        max_num_batched_tokens: tokens of one step.
        line: requests that may always wait in the engine for their first step; `morph_runtime.credits` says who more.
        watermark: share of KV blocks kept free at admission.
        overlap: the next step is scheduled while the present one runs.
        depth: layers whose KV blocks are given up at once on the way up.
        handoff_s: from a free credit, or an arrival that finds one, to the request being in the engine.
    """

    name: str
    costs: StepCosts
    capacities: NDArray[np.int64]
    num_layers: int
    block_tokens: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    line: int = 2
    watermark: float = 0.01
    overlap: bool = False
    depth: int = 1
    handoff_s: float = 0.002

    @property
    def max_level(self) -> int:
        """The deepest level."""
        return self.costs.max_level

    def level_of(self, rung: str) -> int:
        """The level at which all layers are at a rung.

        Raises:
            ConfigError: the ladder does not have it.
        """
        if rung not in self.costs.rungs:
            raise ConfigError(f"The profile has the rungs {', '.join(self.costs.rungs)}, but not '{rung}'.")
        return self.costs.rungs.index(rung) * self.num_layers

    def without_growth(self) -> EngineProfile:
        """Layers change, the KV cache stays as it is (an ablation)."""
        return replace(self, capacities=np.full_like(self.capacities, self.capacities[0]))

    def without_precision(self) -> EngineProfile:
        """The KV cache grows, steps take the time that they take at full precision (an ablation; no engine can)."""
        costs = self.costs
        same = np.repeat(costs.whole_s[:1], len(costs.rungs), axis=0)
        padded = None if costs.padded_s is None else np.repeat(costs.padded_s[:1], len(costs.rungs), axis=0)
        return replace(self, costs=replace(costs, whole_s=same, padded_s=padded))

    def mistaken(self, errors: Sequence[float]) -> StepCosts:
        """The costs as a controller would have them that errs by these shares: one for all times of steps, or one for
        each rung's."""
        costs = self.costs
        factors = 1 + np.asarray(errors, dtype=np.float64)
        padded = None if costs.padded_s is None else costs.padded_s * factors[:, None]
        wrong = replace(costs, whole_s=costs.whole_s * factors[:, None], padded_s=padded)
        if len(errors) > 1:
            return wrong
        prompts = None if costs.prompt_s is None else costs.prompt_s * factors
        names = ("context_s", "pair_s", "mean_context_s", "chunk_s", "row_s", "mixed_s")
        return replace(wrong, prompt_s=prompts, **{name: getattr(costs, name) * float(factors[0]) for name in names})


def read_profile(path: Path) -> EngineProfile:
    """An engine profile from its file.

    Raises:
        ConfigError: the file cannot be read or used; one sentence for the user.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The profile {path} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise ConfigError(f"The profile {path} is not a JSON file.") from None
    try:
        return profile_from(values, path.stem)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"The file {path} is no engine profile: {type(error).__name__} {error}.") from None


def profile_from(values: Mapping[str, Any], name: str) -> EngineProfile:
    """An engine profile from plain values.

    Args:
        values: `costs`, `capacities`, and fields of `EngineProfile` by their names; those with a default may be absent.
        name: used if they have none.

    Raises:
        KeyError, TypeError, ValueError: they do not describe an engine.
    """
    rungs = [str(rung) for rung in values["costs"]["rungs"]]
    capacities = np.asarray(values["capacities"], dtype=np.int64)
    num_layers, rest = divmod(len(capacities) - 1, max(len(rungs) - 1, 1))
    if rest or not num_layers or rungs[0] != "full" or set(rungs) - {"full", *RUNGS}:
        raise ValueError(f"with {len(capacities)} capacities for the rungs {', '.join(rungs)}")
    if capacities.min() < 1 or (np.diff(capacities) < 0).any():
        raise ValueError("with capacities that are not positive or that fall")
    plan = LevelPlan(range(num_layers), [rung for rung in RUNG_BITS if rung in rungs[1:]])
    numbers = ("block_tokens", "max_num_seqs", "max_num_batched_tokens", "line", "depth")
    given: dict[str, Any] = {key: int(values[key]) for key in numbers if key in values}
    given.update({key: float(values[key]) for key in ("watermark", "handoff_s") if key in values})
    given.setdefault("depth", int(values["costs"].get("depth", 1)))
    if min(given.get(key, 1) for key in numbers) < 1:
        raise ValueError(f"with a number below 1 among {', '.join(numbers)}")
    return EngineProfile(
        name=str(values.get("name", name)),
        costs=StepCosts.from_json(values["costs"], plan),
        capacities=capacities,
        num_layers=num_layers,
        overlap=bool(values.get("overlap", False)),
        **given,
    )
