"""What is found before an engine is started."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from morph_runtime.config import EngineConfig, with_variables
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.check import check_engine
from morph_runtime.errors import ConfigError

DEMO = Path(__file__).resolve().parents[3] / "models" / "morph-demo"


def config(**sections: Any) -> EngineConfig:
    model = {"path": str(DEMO), **sections.pop("model", {})}
    return EngineConfig.from_mapping({"model": model, **sections})


def test_the_sizes_are_those_of_the_engine_that_is_built() -> None:
    settings = config(memory={"kv_tokens": 2048})
    said = check_engine(settings)
    engine = build_engine(settings)
    try:
        info = engine.info(0.0)
        at_base = info.base_blocks * info.block_tokens
        assert f"{info.num_layers} layers, context {info.max_model_len:,} tokens" in said
        assert f"hold {at_base:,} tokens of KV cache at full precision" in said
    finally:
        engine.close()


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"memory": {"budget_gib": 0.001}}, "memory.budget_gib is 0.001, but this model needs at least"),
        ({"model": {"max_model_len": 99_999}}, "model.max_model_len is 99999, but the model's context is 2048 tokens"),
        ({"model": {"awq_path": "/no/such"}}, "model.awq_path names '/no/such'"),
        ({"morph": {"order": "/no/such.json"}}, "/no/such.json cannot be read"),
        ({"model": {"max_model_len": 99_999}, "device": "cuda"}, "the model's context is 2048 tokens"),
        ({"model": {"awq_path": "/no/such"}, "device": "cuda"}, "model.awq_path is '/no/such'"),
    ],
)
def test_what_does_not_fit_is_found_without_starting(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_engine(config(**sections))


def test_a_machine_without_a_gpu_can_check_for_one_that_has_it() -> None:
    said = check_engine(dataclasses.replace(config(), device="cuda"))
    assert said.startswith("12 layers, context 2,048 tokens;") and said.endswith("when the server starts")


@pytest.mark.parametrize(
    "sentence, told",
    [
        ("memory.budget_gib is 1.", "memory.budget_gib (MORPH_MEMORY_BUDGET_GIB) is 1."),
        ("device must be cpu.", "device (MORPH_DEVICE) must be cpu."),
        ("The device is gone.", "The device is gone."),
        ("unset model.pack_source (MORPH_PACK_SOURCE).", "unset model.pack_source (MORPH_PACK_SOURCE)."),
        ("memory.budget_gib_more is 1.", "memory.budget_gib_more is 1."),
    ],
)
def test_an_error_names_the_variable_of_its_field(sentence: str, told: str) -> None:
    assert with_variables(sentence) == told
