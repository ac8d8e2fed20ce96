"""A `model.json` of Triton's vLLM backend, read as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from morph_backend.settings import load_model_file
from morph_backend.vllm_arguments import HARMLESS, ONLY, SAME, translate
from morph_runtime.config import EngineConfig
from morph_runtime.errors import ConfigError

# As it stands in the sample repository of Triton's vLLM backend, and what users add to it.
SAMPLE: dict[str, Any] = {
    "model": "facebook/opt-125m",
    "disable_log_requests": True,
    "gpu_memory_utilization": 0.5,
    "enforce_eager": True,
}


def no_gpu() -> int:
    return 0


def config(values: Any, gpu_bytes: int = 0) -> EngineConfig:
    return EngineConfig.from_mapping(translate(values, lambda: gpu_bytes).values)


def test_the_sample_is_read() -> None:
    assert config(SAMPLE).model.path == "facebook/opt-125m"
    assert config(SAMPLE).memory == EngineConfig().memory, "there is no GPU"


def test_what_means_the_same_is_taken_over() -> None:
    read = config(
        {
            **{"model": "m", "dtype": "float", "max_model_len": 1024, "max_num_seqs": 7, "max_num_batched_tokens": 99},
            **{"block_size": 32, "enable_prefix_caching": False, "tokenizer": "m", "tensor_parallel_size": 1},
            "morph": {"mode": "off"},
        }
    )
    assert (read.model.path, read.model.dtype, read.model.max_model_len) == ("m", "float32", 1024)
    assert (read.scheduler.max_num_seqs, read.scheduler.max_num_batched_tokens) == (7, 99)
    assert read.memory.block_tokens == 32 and read.cache.prefix is False and read.morph.mode == "off"


@pytest.mark.parametrize("given, read", [("auto", "auto"), ("safetensors", "auto"), ("dummy", "dummy")])
def test_load_formats_have_vllms_names(given: str, read: str) -> None:
    assert config({"model": "m", "load_format": given}).model.load_format == read


def test_a_share_of_the_gpu_is_a_budget() -> None:
    values = translate({"model": "m", "gpu_memory_utilization": 0.5, "device": "cuda"}, lambda: 80 * 2**30).values
    assert values["memory"] == {"budget_gib": 40.0}
    values = translate(
        {"model": "m", "gpu_memory_utilization": 0.5, "device": "cuda", "memory": {"budget_gib": 3.0}}, lambda: 2**30
    ).values
    assert values["memory"] == {"budget_gib": 3.0}


@pytest.mark.parametrize("device, budget", [("cuda", 40.0), ("cpu", 0.0), ("", 40.0)])
def test_the_environments_device_counts_and_without_one_the_gpu_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, budget: float
) -> None:
    monkeypatch.setattr("morph_backend.settings.gpu_memory_bytes", lambda: 80 * 2**30)
    (tmp_path / "model.json").write_text(json.dumps({"model": "m", "gpu_memory_utilization": 0.5}))
    read = load_model_file(tmp_path / "model.json", {"MORPH_DEVICE": device}).config
    assert (read.device, read.memory.budget_gib) == (device or "cuda", budget)


def test_our_own_form_stays_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("morph_backend.settings.gpu_memory_bytes", lambda: 80 * 2**30)
    (tmp_path / "model.json").write_text(json.dumps({"model": {"path": "m"}}))
    assert load_model_file(tmp_path / "model.json", {}).config.device == "cpu"


@pytest.mark.parametrize("values", [{}, {"model": {"path": "m"}}, {"memory": {"kv_tokens": 64}}, [], "x"])
def test_our_own_form_is_left_as_it_is(values: Any) -> None:
    assert translate(values, no_gpu).values is values


@pytest.mark.parametrize(
    "values, said",
    [
        ({"model": "m", "gpu_memory_utilisation": 0.5}, "'gpu_memory_utilisation' is an engine argument that"),
        ({"model": "m", "tensor_parallel_size": 2}, "'tensor_parallel_size' is 2, but MorphServe serves 1 alone"),
        ({"model": "m", "quantization": "awq"}, "'quantization' is 'awq', but MorphServe serves nothing alone"),
        ({"model": "m", "enable_lora": True}, "'enable_lora' is True"),
        ({"model": "m", "gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be above 0 and at most 1"),
        ({"model": "m", "tokenizer": "other"}, "tokenizer must be left out"),
        ({"model": "m", "max_num_seqs": 3, "scheduler": {"max_num_seqs": 3}}, "are the same setting"),
        ({"model": "m", "max_num_seqs": 3, "scheduler": 5}, "scheduler must be an object"),
    ],
)
def test_what_cannot_be_followed_is_named(values: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        translate(values, no_gpu)


def test_a_wrong_value_is_named_by_the_field(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"model": "m", "dtype": "half"}))
    with pytest.raises(ConfigError, match=r"model.json': model.dtype must be one of .* but is 'float16'"):
        load_model_file(tmp_path / "model.json", {})


def test_metrics_can_be_switched_off(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"model": "m", "disable_log_stats": True}))
    assert load_model_file(tmp_path / "model.json", {}).log_stats is False
    assert load_model_file(tmp_path / "none.json", {}).log_stats is True


def test_the_names_are_sorted_into_one_group_each() -> None:
    assert not (set(SAME) & HARMLESS or set(SAME) & set(ONLY) or HARMLESS & set(ONLY))
