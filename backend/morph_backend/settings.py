"""What the Triton model reads at start: its own settings from `config.pbtxt`, the engine's from `model.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from morph_backend.gpu_memory import gpu_memory_bytes
from morph_backend.vllm_arguments import translate
from morph_runtime.config import EngineConfig
from morph_runtime.errors import ConfigError


@dataclass(frozen=True)
class BackendSettings:
    """Settings of the serving side; each is a `parameters` entry of `config.pbtxt` under its name in capitals."""

    report_custom_metrics: bool = True
    """Whether `vllm:*` and `morph_*` metrics are exported."""
    sender_threads: int = 2
    """Threads that send responses; a request always stays with one of them."""
    cancel_poll_ms: int = 50
    """Milliseconds between polls for cancelled requests."""
    metrics_interval_ms: int = 200
    """Milliseconds over which metric changes are gathered before they are handed to Triton."""
    queue_nudge: bool = True
    """Whether Triton's batcher is woken while a backlog stands; without it a queued request may wait 500 ms longer."""
    log_decisions: bool = True
    """Whether each change of level is one line of the log."""
    queue_poll_ms: int = 200
    """Milliseconds between readings of Triton's own queue metrics."""
    max_request_seconds: int = 3600
    """Seconds after which a request is ended with an error: the only end of a non-streaming one whose client left."""
    start_timeout_seconds: int = 600
    """Seconds that the engine may take to load the model."""
    engine_restarts: int = 5
    """Starts in a row that may fail of themselves before an engine that has ended is given up and the server ends; of
    starts that come to nothing in all, those ended from outside included, four times as many. 0: no restart."""
    engine_restart_pause_ms: int = 500
    """Milliseconds before the second restart in a row; doubles with each further one, up to 30 s."""
    engine_silence_seconds: int = 60
    """Seconds without a word of the engine, while it has requests, after which it is killed and restarted; 0: never.
    Longer than the longest step."""
    send_silence_seconds: int = 60
    """Seconds that Triton may take over one response before it is taken to hang, and the server ends; 0: for ever."""


_LIMITS: Mapping[str, tuple[int, int]] = {
    "sender_threads": (1, 64),
    "cancel_poll_ms": (10, 1000),
    "metrics_interval_ms": (10, 10_000),
    "queue_poll_ms": (50, 10_000),
    "max_request_seconds": (1, 7 * 86_400),
    "start_timeout_seconds": (1, 86_400),
    "engine_restarts": (0, 1000),
    "engine_restart_pause_ms": (0, 30_000),
    "engine_silence_seconds": (0, 86_400),
    "send_silence_seconds": (0, 86_400),
}


def backend_settings(model_config: Mapping[str, Any]) -> BackendSettings:
    """Read the `parameters` of a model configuration; entries that are not ours are left alone.

    Raises:
        ConfigError: a value has the wrong type or is out of range; the text names the parameter.
    """
    settings = BackendSettings()
    parameters = model_config.get("parameters") or {}
    for item in fields(BackendSettings):
        entry = parameters.get(item.name.upper())
        if entry is None:
            continue
        text = str(entry.get("string_value", "")).strip()
        read: Callable[[str, str], Any] = _boolean if isinstance(getattr(settings, item.name), bool) else _integer
        settings = replace(settings, **{item.name: read(item.name, text)})
    return settings


@dataclass(frozen=True)
class ModelFile:
    """A `model.json`, read.

    Attributes:
        config: the engine's settings, the environment's on top.
        log_stats: False if the file asks for no metrics.
    """

    config: EngineConfig
    log_stats: bool = True


def has_queue_timeouts(model_config: Mapping[str, Any]) -> bool:
    """Whether Triton ends requests whose own timeout passes in its queue: the nudges rely on it."""
    batching = model_config.get("dynamic_batching") or {}
    policy = batching.get("default_queue_policy") or {}
    # Numbers of 64 bits are texts in the JSON that Triton makes.
    limited = int(policy.get("default_timeout_microseconds") or 0) > 0
    rejects = policy.get("timeout_action", "REJECT") == "REJECT"
    return bool(policy.get("allow_timeout_override")) and limited and rejects


def load_model_file(model_json: Path, env: Mapping[str, str] | None = None) -> ModelFile:
    """Defaults, then `model.json` (ours, or vLLM's engine arguments), then `MORPH_*` of the environment.

    Without a model path, the demo model is taken.

    Raises:
        ConfigError: the file is not a JSON object of known settings, or a value is out of range.
    """
    values: Any = {}
    if model_json.is_file():
        try:
            values = json.loads(model_json.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ConfigError(f"'{model_json}' cannot be read as JSON: {error}.") from None
    try:
        translated = translate(values, gpu_memory_bytes, (os.environ if env is None else env).get("MORPH_DEVICE", ""))
        config = EngineConfig.from_mapping(translated.values)
    except ConfigError as error:
        raise ConfigError(f"'{model_json}': {error}") from None
    config = config.with_environment(env)
    if not config.model.path and (demo := demo_model()) is not None:
        config = replace(config, model=replace(config.model, path=str(demo)))
    return ModelFile(config, translated.log_stats)


def checkout_root() -> Path | None:
    """The repository's root when the package runs from a checkout, else None."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "model_repository" / "morph" / "config.pbtxt").is_file() else None


def demo_model() -> Path | None:
    """The folder of the demo model in a checkout, if it is there."""
    root = checkout_root()
    folder = root / "models" / "morph-demo" if root else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"config.pbtxt: {name.upper()} must be true or false, but is '{text}'.")
    return text.lower() == "true"


def _integer(name: str, text: str) -> int:
    low, high = _LIMITS[name]
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"config.pbtxt: {name.upper()} must be a whole number, but is '{text}'.") from None
    if not low <= value <= high:
        raise ConfigError(f"config.pbtxt: {name.upper()} must be between {low} and {high}, but is {value}.")
    return value
