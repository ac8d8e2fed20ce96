"""Small seeded Llama checkpoints and their parts, for tests of kernels' users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from morph_runtime.kernels.rung import Rung
from morph_runtime.weights.awq import AwqCheckpoint
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.slots import LayerSlots
from morph_runtime.weights.spec import ModelSpec
from morph_runtime.weights.static import StaticTensors, StaticWeights

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 193,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}


def make_llama(
    folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", seed: int = 0, **changes: Any
) -> Any:
    """Save a random Llama under `folder` and return it, in float32 and eval mode."""
    return make_model(folder, LlamaForCausalLM, LlamaConfig(**{**DEFAULTS, **changes}), dtype, shard, seed)


def make_model(
    folder: Path,
    kind: Callable[[Any], Any],
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    seed: int = 0,
) -> Any:
    """Save a random model of any family under `folder` and return it, in float32 and eval mode."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model.float()


def aligned(nbytes: int) -> Tensor:
    """Zeroed bytes at an address that is a multiple of 64; uint8 [nbytes]."""
    memory = torch.zeros(nbytes + 64, dtype=torch.uint8)
    first = -memory.data_ptr() % 64
    return memory[first : first + nbytes]


@dataclass
class Parts:
    """A checkpoint opened for serving."""

    spec: ModelSpec
    reader: CheckpointReader
    slots: LayerSlots
    static: StaticTensors

    def layer(self, number: int, rung: Rung, source: LayerWeights | None = None) -> LayerWeights:
        """A layer in a slot of its own."""
        slot = aligned(self.slots.slot_bytes(rung))
        self.slots.fill(number, rung, slot, source)
        return self.slots.bind(number, rung, slot)

    def slot_bytes(self, number: int, rung: Rung, source: LayerWeights | None = None) -> Tensor:
        """The bytes that a fill writes; uint8."""
        slot = aligned(self.slots.slot_bytes(rung))
        self.slots.fill(number, rung, slot, source)
        return slot

    def scratch(self) -> Tensor:
        """What forwards need."""
        return aligned(self.slots.scratch_bytes)


def open_parts(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    rungs: Sequence[Rung] = ("full", "w8", "w4"),
    forced: Mapping[Rung, str] | None = None,
    awq: Path | None = None,
) -> Parts:
    """Open a checkpoint and fill its static slot; `awq` is the folder that W4 comes from."""
    spec, reader = ModelSpec.from_folder(folder), CheckpointReader(folder)
    static = StaticWeights(spec, reader, dtype)
    quantized = AwqCheckpoint(awq, spec, reader) if awq is not None else None
    slots = LayerSlots(spec, reader, dtype, rungs, forced=forced, awq=quantized)
    slot = aligned(static.static_bytes)
    static.fill(slot)
    return Parts(spec, reader, slots, static.bind(slot))
