"""The cost model of an engine that starts: from the cache, else measured."""

from __future__ import annotations

import logging
from pathlib import Path

from morph_runtime.costs.cache import CostCache, cache_folder, identity
from morph_runtime.costs.measure import measure
from morph_runtime.engine.core import EngineParts
from morph_runtime.morph.costs import StepCosts
from morph_runtime.morph.levels import LevelPlan


def find_costs(parts: EngineParts, plan: LevelPlan, folder: Path) -> StepCosts | None:
    """The model; None if `morph.costs` is off, or if the controller is and nothing was measured earlier.

    The engine serves nobody yet, and is afterwards as it was.

    Args:
        parts: the engine's.
        plan: its levels.
        folder: the model's.
    """
    config = parts.config
    if config.morph.costs == "off":
        return None
    cache = CostCache(cache_folder(config), identity(parts, plan, folder))
    costs = cache.load(plan)
    if costs is None and config.morph.mode != "off":
        measured = measure(parts, plan, config.morph.cost_budget_s)
        costs = measured.costs
        logging.getLogger(__name__).info("cost model: measured in %.1f s", measured.seconds)
        cache.save(costs, measured.seconds)
    return costs
