"""Models of real shapes with seeded random weights, made on the GPU in seconds: nothing is downloaded or stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from morph_runtime.config import EngineConfig
from morph_runtime.engine.opening import OpenModel, dtype_of
from morph_runtime.kernels.rung import Rung
from morph_runtime.morph.levels import LevelPlan, parse_order
from morph_runtime.weights.layout import SlotLayout
from morph_runtime.weights.packed import PackedBytes
from morph_runtime.weights.slots import LayerSlots
from morph_runtime.weights.spec import ModelSpec
from morph_runtime.weights.static import StaticWeights

COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "head_dim": 128,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, object]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192,
        "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "llama-2-7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "codellama-34b": {
        "hidden_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 22016, "vocab_size": 32000, "rope_theta": 1000000.0, "max_position_embeddings": 16384,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
SPREAD = 0.02


def write_folder(shape: str, folder: Path) -> Path:
    """A folder with the config.json of a shape."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **SHAPES[shape]}), encoding="utf-8")
    return folder


class RandomBytes(PackedBytes):
    """Full precision alone: normal weights of spread 0.02, norms of 1. A seed per layer."""

    def __init__(self) -> None:
        self.layer_layout: SlotLayout | None = None
        self.static_layout: SlotLayout | None = None

    @property
    def from_awq(self) -> bool:
        """No."""
        return False

    def read_layer(self, layer: int, rung: Rung, slot: Tensor) -> None:
        """See `PackedBytes.read_layer`."""
        if rung != "full" or self.layer_layout is None:
            raise ValueError(f"random weights come in full precision, not in {rung}")
        self._fill(self.layer_layout, slot, layer + 1)

    def read_static(self, slot: Tensor) -> None:
        """See `PackedBytes.read_static`."""
        if self.static_layout is None:
            raise ValueError("the layout is not known yet")
        self._fill(self.static_layout, slot, 0)

    def _fill(self, layout: SlotLayout, slot: Tensor, seed: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(seed)
        for name, view in layout.views(slot).items():
            if name.endswith("norm"):
                view.fill_(1.0)
            else:
                values = torch.empty(view.shape, dtype=view.dtype, device=device)
                view.copy_(values.normal_(0.0, SPREAD, generator=generator))
                del values
        if device == "cuda":
            torch.cuda.empty_cache()  # a served model leaves nothing in PyTorch's pool; nor must this


def open_random(config: EngineConfig, device: torch.device) -> OpenModel:
    """An `engine.build.Opener`: the shape in `model.path`, with random weights."""
    spec, reader = ModelSpec.from_folder(config.model.path), RandomBytes()
    rungs: tuple[Rung, ...] = ("full", *(cast(Rung, rung) for rung in config.morph.ladder))
    slots = LayerSlots(spec, reader, dtype_of(config), rungs, device)
    static = StaticWeights(spec, reader, slots.dtype)
    reader.layer_layout, reader.static_layout = slots.layout("full"), static.layout
    plan = LevelPlan(parse_order(config.morph.order, spec.layers), rungs[1:])
    return OpenModel(spec, slots, static, plan, reader)
