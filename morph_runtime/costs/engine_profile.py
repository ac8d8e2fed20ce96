"""An engine profile: one JSON document with all that planning needs to know of an engine on a device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morph_runtime.costs.cache import identity
from morph_runtime.costs.held_out import HeldOut
from morph_runtime.costs.measure import Measured
from morph_runtime.engine.core import EngineParts
from morph_runtime.morph.levels import LevelPlan

FORMAT = 1
KIND = "engine-profile"


def profile_document(
    parts: EngineParts, plan: LevelPlan, measured: Measured, held_out: Sequence[HeldOut], folder: Path
) -> dict[str, Any]:
    """The document, plain values; `StepCosts.from_json` and `LevelPlan(order, ladder)` read its costs.

    Fields: `capacities` are KV blocks by level; `weights_bytes` and `static_bytes` are of the ledger; `identity` says
    what it was measured on; `held_out` has the model's errors, relative, on steps that it was not fitted to.
    """
    config, ledger = parts.config, parts.ledger
    return {
        "format": FORMAT,
        "kind": KIND,
        "name": folder.resolve().name,
        "identity": identity(parts, plan, folder),
        "num_layers": plan.num_layers,
        "ladder": list(plan.ladder),
        "order": list(plan.order),
        "capacities": list(parts.capacities),
        "weights_bytes": [ledger.weight_extents(k) * ledger.extent_bytes for k in range(plan.max_level + 1)],
        "static_bytes": ledger.static_extents * ledger.extent_bytes,
        "budget_bytes": ledger.budget_bytes,
        "block_tokens": config.memory.block_tokens,
        "max_model_len": parts.max_model_len,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
        "line": config.scheduler.line,
        "watermark": config.scheduler.watermark,
        "overlap": config.overlaps,
        "depth": parts.swapper.depth,
        "costs": measured.costs.to_json(),
        "measured_s": round(measured.seconds, 3),
        "unreached": list(measured.unreached),
        "held_out": [row.to_json() for row in held_out],
    }
