"""Layers that are quantized out of CUDA graphs: what comes of it, whatever memory has come behind their addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine

LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers have norms, norms of heads and biases that differ from each other."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=200, max_position_embeddings=256, attention_bias=True, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    place = tmp_path_factory.mktemp("model")
    model.to(torch.float32).save_pretrained(place)
    return place


def make(folder: Path, graphs: bool, ladder: list[str]) -> Engine:
    return build_engine(EngineConfig.from_mapping({
        "device": "cuda",
        "model": {"path": str(folder), "dtype": "bfloat16"},
        "memory": {"kv_tokens": 512, "block_tokens": 16},
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 48},
        "morph": {"mode": "off", "ladder": ladder, "costs": "off"},
        "kernels": {"threads": 1, "graphs": graphs},
        "check_integrity": True,
    }))  # fmt: skip


def fields_of(engine: Engine) -> dict[str, bytes]:
    """Every field of every layer."""
    swapper: Any = engine.parts.swapper
    return {
        f"{layer}.{name}": view.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        for layer, rung in enumerate(swapper.rungs)
        for name, view in swapper._slots.layout(rung).views(swapper.slot_bytes_of(layer)).items()
    }


@pytest.mark.parametrize("rung", ["w8", "w4"])
def test_a_layer_out_of_its_graph_is_bit_for_bit_the_launched_one(folder: Path, rung: str) -> None:
    launched, replayed = make(folder, False, [rung]), make(folder, True, [rung])
    try:
        swapper: Any = replayed.parts.swapper
        assert all((layer, rung) in swapper._filler._graphs for layer in range(LAYERS))
        launched.set_level(LAYERS)
        expected = fields_of(launched)
        assert expected["0.qkv.bias"] != expected["1.qkv.bias"]
        arena: Any = replayed.parts.arena
        arena.extend(2)
        seen = set()
        for _ in range(2):
            replayed.set_level(LAYERS)
            assert fields_of(replayed) == expected
            seen.add(arena.ranges[f"weights.{rung}"].physical[0])
            replayed.set_level(0)
            arena._free._ids.sort(key=seen.__contains__)  # other memory comes behind the addresses next time
        assert len(seen) == 2, "the test needs memory that moves"
        replayed.check_integrity()
    finally:
        launched.close()
        replayed.close()


@pytest.mark.parametrize("rung", ["w8", "w4"])
def test_quantizing_a_layer_on_the_gpu_allocates_nothing(folder: Path, rung: Any) -> None:
    """So its graph owns no memory that another graph could write to meanwhile."""
    engine = make(folder, False, [rung])
    try:
        swapper: Any = engine.parts.swapper
        with swapper.borrow(0, rung) as target:
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            swapper._filler._quantize(target, swapper.bind(0, "full"))
            after = torch.cuda.memory_stats()["allocation.all.allocated"]
            torch.cuda.synchronize()  # the slot is given back
        assert after == before
    finally:
        engine.close()
