"""A model opened for measuring, on the device that the settings name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from morph_runtime.config import EngineConfig, resolve_model_folder
from morph_runtime.engine.build import open_device, open_model
from morph_runtime.engine.environment import cpu_threads, engine_variables
from morph_runtime.engine.opening import CPU, OpenModel
from morph_runtime.errors import ConfigError
from morph_runtime.profile.forward import CpuForward, LayeredForward
from morph_runtime.profile.text import Windows, read_windows
from morph_runtime.profile.weights import CpuLayerStore, Form, LayerStore

Say = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """What a measurement works with."""

    config: EngineConfig
    windows: Windows
    store: LayerStore
    forward: LayeredForward

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.model.spec.layers

    @property
    def model(self) -> OpenModel:
        """The model at full precision."""
        return self.store.models["full"]

    @property
    def w4_from_awq(self) -> bool:
        """Whether the form `w4` is of an AWQ checkpoint: that of a pack made with one."""
        return self.model.packed_awq

    def head(self) -> dict[str, Any]:
        """What a report says of model, machine and text."""
        slots = self.model.slots
        return {
            "torch": str(torch.__version__),
            "model": Path(self.config.model.path).resolve().name,
            "layers": self.layers,
            "device": self.config.device,
            "dtype": str(slots.dtype).removeprefix("torch."),
            "text": {
                "name": self.windows.name,
                "sha256": self.windows.sha256,
                "windows": len(self.windows.tokens),
                "window_tokens": self.windows.length,
                "predicted_tokens": self.windows.predicted,
                "bytes_per_token": round(self.windows.bytes_per_token, 4),
            },
        }


@dataclass(frozen=True)
class SessionOptions:
    """What a user asks for, not yet checked."""

    model: str
    awq: str
    rungs: Sequence[str]
    text: str
    windows: int
    window_tokens: int
    dtype: str
    device: str
    threads: int


def open_session(options: SessionOptions, say: Say) -> Session:
    """Read text and model.

    Args:
        options: from the command line.
        say: told what is being done.

    Raises:
        ConfigError: something does not fit; one sentence for the user.
    """
    ladder = [rung for rung in ("w8", "w4") if rung in options.rungs]
    config = EngineConfig.from_mapping(
        {
            "model": {"path": options.model, "dtype": options.dtype},
            "morph": {"ladder": ladder},
            "kernels": {"threads": options.threads},
            "device": options.device,
        }
    )
    if options.awq and "w4" not in ladder:
        raise ConfigError("--awq gives the weights of W4, but no ladder has w4: add one, or leave --awq out.")
    folder = resolve_model_folder(options.model)
    for name, value in engine_variables(config).items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(cpu_threads(config))
    windows = read_windows(Path(options.text), folder, options.window_tokens, options.windows)
    device = CPU if config.device == "cpu" else open_device(config).torch_device
    model = open_model(config, device)
    if windows.length > model.spec.longest_context:
        raise ConfigError(
            f"--window-tokens is {windows.length}, but the model's context is {model.spec.longest_context} tokens."
        )
    if max(map(max, windows.tokens)) >= model.spec.vocab:
        raise ConfigError(f"{folder}: tokenizer.json has tokens beyond the model's {model.spec.vocab}.")
    models: dict[Form, OpenModel] = {"full": model}
    forms: tuple[Form, ...] = ("w8", "w4")
    models |= {form: model for form in forms if form in ladder}
    if options.awq:
        beside = replace(
            config,
            model=replace(config.model, awq_path=options.awq),
            morph=replace(config.morph, ladder=("w4",)),
        )
        models["awq"] = open_model(beside, device)
    store, forward = _on_device(device, models, windows.length, say)
    return Session(config, windows, store, forward)


def _on_device(
    device: torch.device, models: Mapping[Form, OpenModel], length: int, say: Say
) -> tuple[LayerStore, LayeredForward]:
    if device.type == "cpu":
        store: LayerStore = CpuLayerStore(models, say)
        return store, CpuForward(store, length)
    from morph_runtime.profile.cuda import CudaForward, CudaLayerStore

    store = CudaLayerStore(models, device, say)
    return store, CudaForward(store, length)
