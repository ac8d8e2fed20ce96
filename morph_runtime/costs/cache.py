"""Cost models that were measured before, one file each, found by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from morph_runtime import __version__
from morph_runtime.config import EngineConfig
from morph_runtime.engine.core import EngineParts
from morph_runtime.engine.environment import cpu_threads, usable_cores
from morph_runtime.errors import ConfigError
from morph_runtime.morph.costs import StepCosts
from morph_runtime.morph.levels import LevelPlan
from morph_runtime.weights.jsonfile import read_json

FORMAT = 1
MAX_BYTES = 2**20
"""A model of 100 sizes has some kilobytes."""
CPUINFO = Path("/proc/cpuinfo")


def device_name(config: EngineConfig) -> str:
    """What the device is called: the GPU's name, or the processor's model and its usable cores."""
    if config.device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {usable_cores()} cores"


def identity(parts: EngineParts, plan: LevelPlan, folder: Path) -> dict[str, Any]:
    """All that a cost model depends on, as plain values.

    Args:
        parts: the engine's.
        plan: its levels.
        folder: the model's.

    Raises:
        ConfigError: config.json has gone since the model was opened.
    """
    config = parts.config
    try:
        digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {error.strerror or error}.") from None
    kernels = config.kernels
    return {
        "product": __version__,
        "torch": str(torch.__version__),
        "device": device_name(config),
        "threads": cpu_threads(config),
        "model": digest,
        "awq": bool(config.model.awq_path),
        "dtype": str(parts.dtype).removeprefix("torch."),
        "ladder": list(plan.ladder),
        "kernels": {"full": kernels.full, "w8": kernels.w8, "w4": kernels.w4, "graphs": kernels.graphs},
        "kv_dtype": parts.kv_format.name,
        "block_tokens": config.memory.block_tokens,
        "memory": [config.memory.budget_gib, config.memory.kv_tokens, config.model.max_model_len],
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
        "depth": config.morph.depth,
        "overlap": config.overlaps,
        "step_sizes": [list(parts.runner.step_sizes), list(parts.runner.mixed_step_sizes)],
        "budget_s": config.morph.cost_budget_s,
    }


def cache_folder(config: EngineConfig, env: Mapping[str, str] | None = None) -> Path:
    """Where cost models are kept: `morph.cost_cache`, else a folder in the user's cache (XDG)."""
    if config.morph.cost_cache:
        return Path(config.morph.cost_cache)
    env = os.environ if env is None else env
    home = env.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~")) / ".cache"
    return base / "morphserve" / "costs"


class CostCache:
    """A folder of cost models. That it is of no use is never an error: it is logged, and one measures anew."""

    def __init__(self, folder: Path, of: Mapping[str, Any]) -> None:
        """`of`: see `identity`."""
        self._of = json.loads(json.dumps(of))
        key = hashlib.sha256(json.dumps(self._of, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{key[:32]}.json"

    def load(self, plan: LevelPlan) -> StepCosts | None:
        """The model for the levels of a plan; None if there is none, or its file is damaged or of something else."""
        if not os.path.lexists(self.path):
            return None
        try:
            values = read_json(self.path, MAX_BYTES)
            if values.get("format") != FORMAT or values.get("identity") != self._of:
                raise ValueError("it is of something else")
            return StepCosts.from_json(values["costs"], plan)
        except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
            logging.getLogger(__name__).warning(
                "the cost model in %s is ignored, steps are measured anew: %s", self.path, error
            )
            return None

    def save(self, costs: StepCosts, seconds: float) -> None:
        """Keep a model, which took so many seconds to measure. The file is complete or not there."""
        values = {"format": FORMAT, "identity": self._of, "seconds": round(seconds, 3), "costs": costs.to_json()}
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            logging.getLogger(__name__).warning(
                "the cost model cannot be kept in %s, each start measures anew (MORPH_COST_CACHE names another "
                "folder): %s", self.path.parent, error.strerror or error,
            )  # fmt: skip
