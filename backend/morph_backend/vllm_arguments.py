"""`model.json` as it stands in a repository of Triton's vLLM backend: engine arguments by vLLM's names.

What means the same here is taken over, what changes nothing is let pass, and the rest is refused by name, so that no
setting is lost in silence. Our own sections may stand beside them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from morph_runtime.config import EngineConfig
from morph_runtime.errors import ConfigError

SAME: Mapping[str, tuple[str, str]] = {
    "model": ("model", "path"),
    "dtype": ("model", "dtype"),
    "load_format": ("model", "load_format"),
    "max_model_len": ("model", "max_model_len"),
    "max_num_seqs": ("scheduler", "max_num_seqs"),
    "max_num_batched_tokens": ("scheduler", "max_num_batched_tokens"),
    "block_size": ("memory", "block_tokens"),
    "enable_prefix_caching": ("cache", "prefix"),
}
"""vLLM's name, and the section and field that mean the same."""

HARMLESS = frozenset(
    {
        *("disable_log_requests", "enable_log_requests", "max_log_len", "enforce_eager", "seed", "swap_space"),
        *(
            "guided_decoding_backend",
            "distributed_executor_backend",
            "worker_use_ray",
            "download_dir",
            "use_tqdm_on_load",
        ),
        *("disable_custom_all_reduce", "max_parallel_loading_workers", "max_seq_len_to_capture", "max_logprobs"),
    }
)
"""Names that say how vLLM works and not what its clients get."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "enable_chunked_prefill": (None, True),
    "enable_lora": (None, False),
    "trust_remote_code": (False,),
    "quantization": (None,),
    "kv_cache_dtype": ("auto",),
    "tokenizer_mode": ("auto",),
    "revision": (None,),
    "tokenizer_revision": (None,),
    "speculative_config": (None,),
    "cpu_offload_gb": (0,),
    "skip_tokenizer_init": (False,),
}
"""Names whose values here ask for what is done anyway; other values ask for what this engine has not."""

_VALUES: Mapping[str, Mapping[Any, str]] = {
    "dtype": {"float": "float32", "half": "float16"},
    "load_format": {"safetensors": "auto"},
}
"""What vLLM calls a value otherwise, by argument."""


@dataclass(frozen=True)
class Translated:
    """A `model.json` in the engine's own form.

    Attributes:
        values: for `EngineConfig.from_mapping`.
        log_stats: False if `disable_log_stats` asks for no metrics.
    """

    values: Mapping[str, Any]
    log_stats: bool = True


def translate(values: Any, gpu_bytes: Callable[[], int], device: str = "") -> Translated:
    """Bring a `model.json` into the engine's own form; one that is in it already is left as it is.

    Args:
        values: what stands in the file.
        gpu_bytes: memory of the GPU that `gpu_memory_utilization` is a share of; 0 without a GPU.
        device: what the environment says; it goes before what the file says. Where neither says anything, arguments of
            vLLM's mean the GPU, if there is one.

    Raises:
        ConfigError: an argument that this engine cannot follow, or a setting that is given twice.
    """
    sections = {item.name for item in fields(EngineConfig)}
    if not isinstance(values, Mapping) or not any(_is_vllms(key, value, sections) for key, value in values.items()):
        return Translated(values)
    own = {key: value for key, value in values.items() if not _is_vllms(key, value, sections)}
    tree: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in own.items()}
    given = {key: value for key, value in values.items() if key not in own}
    log_stats = not given.pop("disable_log_stats", False)
    share = given.pop("gpu_memory_utilization", None)
    tokenizer = given.pop("tokenizer", None)
    if tokenizer not in (None, given.get("model")):
        raise ConfigError("tokenizer must be left out or name the model's folder: its tokenizer is used.")
    for key, value in given.items():
        if key in SAME:
            if value is not None:
                section, name = SAME[key]
                _put(tree, section, name, _same_value(key, value), key)
        elif key in ONLY:
            _check_only(key, value)
        elif key not in HARMLESS:
            known = ", ".join(sorted({*SAME, *ONLY, *HARMLESS, "disable_log_stats", "gpu_memory_utilization"}))
            raise ConfigError(f"'{key}' is an engine argument that MorphServe does not know; it knows: {known}.")
    device = device or tree.get("device", "")
    total = 0 if device == "cpu" else gpu_bytes()
    if not device and total:
        tree["device"] = "cuda"
    if share is not None:
        _budget(tree, share, total)
    return Translated(tree, log_stats)


def _is_vllms(key: str, value: Any, sections: set[str]) -> bool:
    """Only `model` is a name in both: vLLM's is a text, ours an object."""
    return isinstance(value, str) if key == "model" else key not in sections


def _same_value(key: str, value: Any) -> Any:
    return _VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def _put(tree: dict[str, Any], section: str, name: str, value: Any, key: str) -> None:
    inner = tree.setdefault(section, {})
    if not isinstance(inner, dict):
        raise ConfigError(f"{section} must be an object with named fields.")
    if name in inner:
        raise ConfigError(f"'{key}' and {section}.{name} are the same setting: leave one of them out.")
    inner[name] = value


def _check_only(key: str, value: Any) -> None:
    allowed = ONLY[key]
    if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed):
        shown = " or ".join(str(item) for item in allowed if item is not None) or "nothing"
        raise ConfigError(f"'{key}' is {value!r}, but MorphServe serves {shown} alone: leave it out.")


def _budget(tree: dict[str, Any], share: Any, total_bytes: int) -> None:
    """`gpu_memory_utilization` as a budget; a budget of our own in the file wins, for it says more."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, but is {share!r}.")
    memory = tree.setdefault("memory", {})
    if not isinstance(memory, dict):
        raise ConfigError("memory must be an object with named fields.")
    if total_bytes == 0:
        logging.getLogger(__name__).warning("gpu_memory_utilization is not heeded: the engine uses no GPU.")
    else:
        memory.setdefault("budget_gib", share * total_bytes / 2**30)
