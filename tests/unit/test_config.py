"""Settings: every bad value is one sentence that names the field; good ones survive a round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morph_runtime.config import ENVIRONMENT, MODES, Defaults, EngineConfig, completed, resolve_model_folder, validate
from morph_runtime.errors import ConfigError


def test_a_configuration_survives_json() -> None:
    config = EngineConfig.from_mapping({"morph": {"ladder": ["w8", "w4"]}, "memory": {"budget_gib": 2}})
    assert EngineConfig.from_mapping(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"memory": {"budget": 1}}, r"Unknown setting 'memory\.budget'; known are: block_tokens, budget_gib"),
        ({"memory": {"budget_gib": "much"}}, r"memory\.budget_gib must be a number, but is 'much'"),
        ({"memory": {"budget_gib": -1}}, r"memory\.budget_gib must be between 0 and"),
        ({"memory": {"budget_gib": float("nan")}}, r"memory\.budget_gib must be between"),
        ({"memory": {"budget_gib": 10**400}}, r"memory\.budget_gib must be between 0 and .* but is inf"),
        ({"memory": {"kv_tokens": -(10**400)}}, r"memory\.kv_tokens must be between"),
        ({"memory": {"prefault": 1}}, r"memory\.prefault must be true or false"),
        ({"scheduler": {"max_num_seqs": True}}, r"scheduler\.max_num_seqs must be a whole number"),
        ({"scheduler": {"max_num_seqs": 9, "max_num_batched_tokens": 8}}, r"max_num_batched_tokens .*max_num_seqs"),
        ({"scheduler": 3}, r"scheduler must be an object"),
        ({"morph": {"mode": "fast"}}, r"morph\.mode must be one of accuracy, balanced, performance, off"),
        ({"morph": {"ladder": []}}, r"morph\.ladder"),
        ({"morph": {"ladder": ["w4", "w8"]}}, r"w8 before w4"),
        ({"morph": {"ladder": ["w2"]}}, r"morph\.ladder must be one of w8, w4"),
        ({"morph": {"pin": "w2"}}, r"morph\.pin must be one of , full, w8, w4, but is 'w2'"),
        ({"morph": {"pin": "w8"}}, r"morph\.pin is w8, which morph\.ladder \(w4\) does not have: set MORPH_LADDER=w8"),
        ({"cache": {"reuse": "some"}}, r"cache\.reuse must be one of exact, at_least, any, but is 'some'"),
        ({"cache": {"prefix": "yes"}}, r"cache\.prefix must be true or false"),
        ({"model": {"awq_path": "x"}, "morph": {"ladder": ["w8"]}}, r"model\.awq_path .*morph\.ladder has no w4"),
        ({"memory": {"kv_dtype": "int4"}}, r"memory\.kv_dtype must be one of auto, fp8, int8, but is 'int4'"),
        ({"device": "tpu"}, r"device must be one of cpu"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig.from_mapping(values)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("MORPH_MEMORY_BUDGET_GIB", "lots", "MORPH_MEMORY_BUDGET_GIB must be a number, but is 'lots'"),
        ("MORPH_KV_TOKENS", "1.5", "MORPH_KV_TOKENS must be a whole number"),
        ("MORPH_MODE", "fast", "morph.mode must be one of"),
        ("MORPH_PREFIX_CACHE", "maybe", "MORPH_PREFIX_CACHE must be true or false, but is 'maybe'"),
        ("MORPH_PREFIX_REUSE", "all", "cache.reuse must be one of"),
        ("MORPH_KV_DTYPE", "fp16", "memory.kv_dtype must be one of auto, fp8, int8, but is 'fp16'"),
        ("MORPH_OVERLAP", "maybe", "overlap must be one of auto, on, off, but is 'maybe'"),
    ],
)
def test_a_bad_environment_value_is_named(name: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig().with_environment({name: text})


def test_the_environment_wins_over_the_file_and_empty_means_unset() -> None:
    config = EngineConfig.from_mapping({"morph": {"mode": "off"}})
    assert config.with_environment({"MORPH_MODE": ""}).morph.mode == "off"
    changed = config.with_environment({"MORPH_MODE": "accuracy", "MORPH_LADDER": "w8,w4", "MORPH_THREADS": "3"})
    assert (changed.morph.mode, changed.morph.ladder, changed.kernels.threads) == ("accuracy", ("w8", "w4"), 3)


def test_steps_overlap_when_told_to_and_by_themselves_only_beside_a_device() -> None:
    assert not EngineConfig().overlaps
    assert EngineConfig().with_environment({"MORPH_OVERLAP": "on"}).overlaps
    assert EngineConfig(device="cuda").overlaps
    assert not EngineConfig(device="cuda", overlap="off").overlaps


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("False", False), ("0", False)])
def test_a_switch_in_the_environment_is_true_or_false(text: str, value: bool) -> None:
    assert EngineConfig().with_environment({"MORPH_PREFIX_CACHE": text}).cache.prefix is value


@given(st.dictionaries(st.sampled_from(sorted(ENVIRONMENT)), st.text(max_size=8)))
def test_any_environment_gives_a_configuration_or_one_sentence(environment: dict[str, str]) -> None:
    said = "."
    try:
        mode = EngineConfig().with_environment(environment).morph.mode
    except ConfigError as error:
        said = str(error)
    else:
        assert mode in MODES
    assert said.endswith(".")
    assert "\n" not in said


def test_a_model_folder_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set MORPH_MODEL"):
        resolve_model_folder("")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_model_folder(str(tmp_path))


DEVICE = Defaults(budget_gib=72, kv_tokens=0, max_num_seqs=256, max_num_batched_tokens=2048)


@pytest.mark.parametrize(
    ("given", "budget", "tokens", "seqs", "batched"),
    [
        ({}, 72, 0, 256, 2048),
        ({"memory": {"budget_gib": 3}}, 3, 0, 256, 2048),
        ({"memory": {"kv_tokens": 99}}, 0, 99, 256, 2048),
        ({"scheduler": {"max_num_seqs": 4096}}, 72, 0, 4096, 4096),
        ({"scheduler": {"max_num_batched_tokens": 32}}, 72, 0, 32, 32),
        ({"scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 9}}, 72, 0, 8, 9),
    ],
)
def test_the_device_fills_in_what_is_left_open_and_nothing_else(
    given: dict[str, Any], budget: float, tokens: int, seqs: int, batched: int
) -> None:
    whole = completed(EngineConfig.from_mapping(given), DEVICE)
    assert (whole.memory.budget_gib, whole.memory.kv_tokens) == (budget, tokens)
    assert (whole.scheduler.max_num_seqs, whole.scheduler.max_num_batched_tokens) == (seqs, batched)
    validate(whole)
