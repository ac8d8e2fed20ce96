"""Every family against `transformers`, on a seeded tiny configuration of its own architecture."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.conftest import engines, run_all, submit
from models.reference import drive, expect_same, put_weights
from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import Rung
from morph_runtime.weights.spec import ModelSpec
from weights.awq_packer import make_awq
from weights.tiny_checkpoint import DEFAULTS, make_llama, make_model, open_parts

if TYPE_CHECKING:
    from engine.conftest import EngineFactory

__all__ = ["engines"]

WINDOW = 19
"""Tokens; no multiple of a block, and shorter than most prompts."""
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama-2": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama-3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-3.2": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "codellama": (
        LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    ),
    "vicuna": (
        LlamaForCausalLM, LlamaConfig,
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 64}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 4}),
    "qwen2.5-yarn": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen2-window": (Qwen2ForCausalLM, Qwen2Config, {**SLIDING, "max_window_layers": 1}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 64}),
    "qwen3-mha-bias": (
        Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32, "num_key_value_heads": 4, "attention_bias": True}
    ),
    "qwen3-window": (Qwen3ForCausalLM, Qwen3Config, {**SLIDING, "head_dim": 32, "max_window_layers": 0}),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A model saved under tmp_path / "m"."""
    kind, config, changes = FAMILIES[request.param]
    return make_model(tmp_path / "m", kind, config(**{**DEFAULTS, **changes}))


def test_logits_and_tokens_equal_transformers(family: Any, tmp_path: Path) -> None:
    work = drive(open_parts(tmp_path / "m", rungs=["full"]), ["full", "full"])
    expect_same(family, work, 1e-4)


@pytest.mark.parametrize("rungs", [["w8", "w4"], ["w4", "full"]])
@pytest.mark.parametrize("awq", [False, True], ids=["rounded", "awq"])
def test_every_rung_equals_a_model_with_its_weights(family: Any, tmp_path: Path, rungs: list[Rung], awq: bool) -> None:
    parts = open_parts(tmp_path / "m", awq=make_awq(tmp_path / "m", tmp_path / "awq") if awq else None)
    work = drive(parts, rungs)
    put_weights(family, parts, rungs)
    expect_same(family, work, 2e-4)


def test_the_engine_says_what_transformers_says(family: Any, tmp_path: Path, engines: EngineFactory) -> None:
    """Chunked prefill and decodes of many requests at once, preempted at times; then levels come and go."""
    engine = engines(tmp_path / "m", memory={"kv_tokens": 256}, morph={"ladder": ["w8", "w4"]})
    rng = random.Random(4)
    prompts = [[rng.randrange(1, 193) for _ in range(rng.randint(1, 110))] for _ in range(8)]
    for key, prompt in enumerate(prompts):
        submit(engine, key, prompt, 20)
    tokens = run_all(engine)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for key, prompt in enumerate(prompts):
        with torch.inference_mode():
            scores = model(torch.tensor([prompt + tokens[key][:-1]])).logits[0, len(prompt) - 1 :]
        assert tokens[key] == scores.argmax(-1).tolist()
    engine.set_level(4)
    engine.set_level(0)
    submit(engine, 99, prompts[0], 20)
    assert run_all(engine)[99] == tokens[0]


@pytest.mark.parametrize("kind,config,switch", [
    (MistralForCausalLM, MistralConfig, {}),
    (Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "max_window_layers": 1}),
    (Qwen3ForCausalLM, Qwen3Config, {"use_sliding_window": True, "max_window_layers": 1}),
])  # fmt: skip
def test_a_window_that_is_not_written_is_the_familys_and_null_is_none(
    tmp_path: Path, kind: Any, config: Any, switch: dict[str, Any]
) -> None:
    make_model(tmp_path, kind, config(**{**DEFAULTS, **switch}))
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values = {name: value for name, value in values.items() if name not in ("layer_types", "sliding_window")}
    for written in ({}, {"sliding_window": None}):
        path.write_text(json.dumps({**values, **written}))
        window = AutoConfig.from_pretrained(tmp_path).sliding_window or 0
        assert window == (0 if written else 4096)
        assert ModelSpec.from_folder(tmp_path).windows == (0 if switch else window, window)


@pytest.mark.parametrize("rope", [
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
], ids=["yarn", "linear"])  # fmt: skip
def test_a_context_beyond_the_configs_equals_transformers(
    tmp_path: Path, rope: dict[str, Any], engines: EngineFactory
) -> None:
    model = make_llama(tmp_path, rope_parameters=rope, max_position_embeddings=16)
    prompt = [random.Random(2).randrange(1, 193) for _ in range(40)]
    engine = engines(tmp_path, model={"max_model_len": 64})
    submit(engine, 1, prompt, 24)
    tokens = run_all(engine)[1]
    with torch.inference_mode():
        scores = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    assert len(tokens) == 24 and tokens == scores.argmax(-1).tolist()
    with pytest.raises(ConfigError, match=r"model\.max_model_len is 65, but the model's context is 64 tokens"):
        engines(tmp_path, model={"max_model_len": 65})
    assert engines(tmp_path).parts.max_model_len == 16


@pytest.mark.parametrize("field,value,message", [
    ("layer_types", ["full_attention"], r"'layer_types' must hold .* for each of the 2 layers"),
    ("layer_types", ["full_attention", "chunked"], r"'layer_types' must hold 'sliding_attention' or 'full_attention'"),
    ("sliding_window", 0, r"'sliding_window' must be a whole number from 1"),
    ("use_sliding_window", "yes", r"'use_sliding_window' must be true or false"),
])  # fmt: skip
def test_a_bad_window_is_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    make_model(tmp_path, Qwen2ForCausalLM, Qwen2Config(**{**DEFAULTS, **SLIDING}))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    with pytest.raises(ConfigError, match=message):
        open_parts(tmp_path)
