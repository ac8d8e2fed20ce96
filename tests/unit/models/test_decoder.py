from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.driver import Driver, PlainKV, Run
from models.reference import drive, expect_same, put_weights
from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import Rung
from morph_runtime.models.decoder import Decoder
from weights.tiny_checkpoint import make_llama, open_parts

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1},
    "llama3-rope": {"rope_parameters": LLAMA3},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn-rope": {"rope_parameters": YARN},
    "dynamic-rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "wide-heads": {"head_dim": 64},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_tokens_equal_transformers(tmp_path: Path, variant: str) -> None:
    model = make_llama(tmp_path, **VARIANTS[variant])
    work = drive(open_parts(tmp_path, rungs=["full"]), ["full", "full"])
    expect_same(model, work, 1e-4)


def test_many_equal_decodes_equal_transformers(tmp_path: Path) -> None:
    """A pure decode step of consecutive rows takes the shortest way through attention."""
    model = make_llama(tmp_path)
    parts = open_parts(tmp_path, rungs=["full"])
    kv = PlainKV(parts.spec, 64, 8, torch.float32)
    driver = Driver(Decoder(parts.spec, parts.static, kv, parts.scratch()), kv, parts.spec)
    work = [Run([i, i + 1, i + 2], 10, 64) for i in range(9)]
    layers = [parts.layer(i, "full") for i in range(2)]
    while not all(run.finished for run in work):
        driver.step(work, layers)
    expect_same(model, work, 1e-4)


@pytest.mark.parametrize("rungs", [["w8", "w8"], ["w4", "w4"], ["w4", "full"], ["full", "w8"], ["w8", "w4"]])
def test_a_mix_of_rungs_equals_a_model_with_those_weights(tmp_path: Path, rungs: list[Rung]) -> None:
    model = make_llama(tmp_path)
    parts = open_parts(tmp_path)
    work = drive(parts, rungs)
    put_weights(model, parts, rungs)
    expect_same(model, work, 1e-4)


def test_bfloat16_stays_close_to_float32_at_every_rung(tmp_path: Path) -> None:
    model = make_llama(tmp_path, torch.bfloat16, vocab_size=256, initializer_range=0.02)
    parts = open_parts(tmp_path, torch.bfloat16)
    kernels = {rung: parts.slots.kernel_names(rung)["down"] for rung in parts.slots.rungs}
    for rung in parts.slots.rungs:
        work = drive(parts, [rung, rung], torch.bfloat16)
        put_weights(model, parts, [rung, rung])
        for run in work:
            with torch.no_grad():
                logits = model(torch.tensor([run.prompt + run.tokens[:-1]])).logits[0, len(run.prompt) - 1 :]
            error = (torch.stack(run.logits) - logits).abs().max() / logits.std()
            assert error < 0.15, (rung, kernels[rung], float(error))


def test_a_chunk_without_logits_leaves_nothing_unwritten_behind(tmp_path: Path) -> None:
    """Its last layer stops early, but must clear the rest of a block that it opens: decodes gather whole blocks."""
    model = make_llama(tmp_path)
    parts = open_parts(tmp_path, rungs=["full"])
    kv = PlainKV(parts.spec, 64, 16, torch.float32)
    driver = Driver(Decoder(parts.spec, parts.static, kv, parts.scratch()), kv, parts.spec)
    work = [Run(list(range(9)), 12, 5), Run(list(range(50, 71)), 12, 5)]
    for run in work:
        driver.finish([run], [parts.layer(i, "full") for i in range(2)])
    expect_same(model, work, 1e-4)


def test_a_step_without_wanted_logits_still_writes_kv(tmp_path: Path) -> None:
    make_llama(tmp_path)
    parts = open_parts(tmp_path, rungs=["full"])
    kv = PlainKV(parts.spec, 64, 8, torch.float32)
    decoder = Decoder(parts.spec, parts.static, kv, parts.scratch())
    driver = Driver(decoder, kv, parts.spec)
    run = Run(list(range(20)), 1, 16)
    batch = driver.batch([run])
    layers = [parts.layer(i, "full") for i in range(2)]
    assert decoder.forward(batch, layers).shape == (0, parts.spec.vocab)
    for layer in range(2):
        assert kv.k(layer)[run.blocks[0]].isfinite().all() and kv.v(layer)[run.blocks[1]].isfinite().all()


def test_logits_can_be_changed_in_place_outside_inference_mode(tmp_path: Path) -> None:
    make_llama(tmp_path)
    parts = open_parts(tmp_path, rungs=["full"])
    work = drive(parts, ["full", "full"])
    work[0].logits[0].mul_(0.5)


def test_context_limit_and_cache_shape_are_checked(tmp_path: Path) -> None:
    make_llama(tmp_path)
    parts = open_parts(tmp_path, rungs=["full"])
    kv = PlainKV(parts.spec, 4, 8, torch.float32)
    with pytest.raises(ConfigError, match=r"max_model_len is 257, but the model is made for 256 tokens"):
        Decoder(parts.spec, parts.static, kv, parts.scratch(), 257)
    with pytest.raises(ConfigError, match=r"The KV cache holds .*bfloat16"):
        Decoder(parts.spec, parts.static, PlainKV(parts.spec, 4, 8, torch.bfloat16), parts.scratch())
    assert Decoder(parts.spec, parts.static, kv, parts.scratch(), 64).workspace_bytes > 0
