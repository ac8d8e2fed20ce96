"""What can be found wrong, and said about sizes, before an engine is started. Takes no memory for weights or KV."""

from __future__ import annotations

from pathlib import Path

from morph_runtime.config import EngineConfig, resolve_model_folder
from morph_runtime.engine.build import check_context, plan_engine
from morph_runtime.errors import ConfigError
from morph_runtime.memory.ledger import GIB
from morph_runtime.weights.spec import ModelSpec


def check_engine(config: EngineConfig) -> str:
    """Sizes in words: layers, context, and the KV cache at full precision and at the deepest level.

    On a GPU the budget is cut by measurement when the engine starts, and the machine that checks may have none: there
    the folders and the context are checked alone.

    Raises:
        ConfigError: the model, the device or the budget does not fit; one sentence for the user.
    """
    if config.device != "cpu":
        return _without_device(config)
    planned = plan_engine(config)
    ledger, deepest, tokens = planned.ledger, planned.model.plan.max_level, config.memory.block_tokens
    at = [ledger.kv_blocks_at_level(level) * tokens for level in (0, deepest)]
    return (
        f"{planned.model.spec.layers} layers, context {planned.max_model_len:,} tokens; "
        f"{ledger.budget_bytes / GIB:.2f} GiB hold {at[0]:,} tokens of KV cache at full precision and "
        f"{at[1]:,} at the deepest level"
    )


def _without_device(config: EngineConfig) -> str:
    spec = ModelSpec.from_folder(resolve_model_folder(config.model.path))
    check_context(config, spec)
    if config.model.awq_path and not (Path(config.model.awq_path) / "config.json").is_file():
        raise ConfigError(f"model.awq_path is '{config.model.awq_path}', which is no folder with a config.json.")
    context = config.model.max_model_len or spec.max_positions
    return (
        f"{spec.layers} layers, context {context:,} tokens; whether the GPU and the budget will do is seen when the "
        "server starts"
    )
