from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from morph_runtime.errors import ConfigError
from morph_runtime.weights.spec import ModelSpec

V4 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 128001,
}


def write(folder: Path, generation: Any = None, **changes: Any) -> Path:
    values = {**V4, **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_transformers_4_spelling(tmp_path: Path) -> None:
    spec = ModelSpec.from_folder(write(tmp_path, {"eos_token_id": [128001, 128008, 128009]}))
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.ffn, spec.layers) == (32, 8, 128, 14336, 32)
    assert spec.eos_ids == (128001, 128008, 128009)
    assert spec.dtype == torch.bfloat16 and not spec.tied_embeddings
    rope = spec.rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_positions) == ("llama3", 500000.0, 8.0, 8192)
    assert [(s.name, s.out_features, s.in_features) for s in spec.linears] == [
        ("qkv", 6144, 4096),
        ("o", 4096, 4096),
        ("gate_up", 28672, 4096),
        ("down", 4096, 14336),
    ]


def test_transformers_5_spelling(tmp_path: Path) -> None:
    parameters = {"rope_type": "linear", "rope_theta": 250.0, "factor": 2}
    spec = ModelSpec.from_folder(
        write(
            tmp_path,
            rope_theta="absent",
            rope_scaling="absent",
            rope_parameters=parameters,
            torch_dtype="absent",
            dtype="float16",
            head_dim=64,
            num_key_value_heads="absent",
            eos_token_id=None,
        )
    )
    assert (spec.rope.kind, spec.rope.theta, spec.rope.factor) == ("linear", 250.0, 2.0)
    assert (spec.head_dim, spec.kv_heads, spec.dtype, spec.eos_ids) == (64, 32, torch.float16, ())


def test_old_checkpoints_without_rope_fields(tmp_path: Path) -> None:
    spec = ModelSpec.from_folder(write(tmp_path, rope_theta="absent", rope_scaling=None))
    assert (spec.rope.kind, spec.rope.theta) == ("default", 10000.0)


def test_rope_scaling_goes_before_rope_parameters(tmp_path: Path) -> None:
    """transformers 5 writes the latter always; users add the former as the cards of models say."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain = {"rope_type": "default", "rope_theta": 1e6}
    written = {"rope_theta": "absent", "rope_scaling": scaling, "rope_parameters": plain}
    rope = ModelSpec.from_folder(write(tmp_path, **written)).rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_positions) == ("yarn", 1e6, 4.0, 32768)
    own = {**written, "rope_scaling": {**scaling, "rope_theta": 5e6}, "rope_theta": 1e4}
    assert ModelSpec.from_folder(write(tmp_path, **own)).rope.theta == 5e6
    assert ModelSpec.from_folder(write(tmp_path, **{**written, "rope_theta": None})).rope == rope
    for nothing in (None, {}):
        assert ModelSpec.from_folder(write(tmp_path, **{**written, "rope_scaling": nothing})).rope.kind == "default"


@pytest.mark.parametrize("positions,rope,longest", [
    (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    (131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    (40960, {"rope_type": "yarn", "factor": 4.0}, 163840),
    (32768, {"rope_type": "yarn", "factor": 0.5}, 32768),
    (4096, {"rope_type": "linear", "factor": 2.5}, 10240),
    (4096, {"rope_type": "linear", "factor": 0.5}, 4096),
    (4096, {"rope_type": "linear", "factor": 1e308}, 2**31),
    (4096, {"rope_type": "dynamic", "factor": 4.0}, 4096),
    (131072, V4["rope_scaling"], 131072),
    (4096, None, 4096),
])  # fmt: skip
def test_the_longest_context_follows_the_rope_scaling(tmp_path: Path, positions: int, rope: Any, longest: int) -> None:
    spec = ModelSpec.from_folder(write(tmp_path, max_position_embeddings=positions, rope_scaling=rope))
    assert (spec.max_positions, spec.longest_context) == (positions, longest)


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, r"'GPT2LMHeadModel' is not served; served are: LlamaForCausalLM"),
    ({"architectures": "absent"}, r"'architectures' must name the architecture; served are: LlamaForCausalLM"),
    (
        {"quantization_config": {"quant_method": "awq"}},
        r"quantized already \(awq\); set model.path .* model.awq_path \(MORPH_AWQ\) to",
    ),
    ({"quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\); give the unquantized"),
    ({"quantization_config": {"load_in_4bit": True}}, r"quantized already \(bitsandbytes\); give the unquantized"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, r"\(compressed-tensors\); give the unquantized"),
    ({"hidden_act": "gelu"}, r"'hidden_act' must be 'silu', but is 'gelu'"),
    ({"hidden_size": "absent"}, r"'hidden_size' must be a whole number from 1 to \d+, but is None"),
    ({"hidden_size": True}, r"'hidden_size' must be a whole number"),
    ({"hidden_size": 4100}, r"'hidden_size' \(4100\) is not a multiple of 'num_attention_heads' \(32\)"),
    ({"num_key_value_heads": 5}, r"'num_attention_heads' \(32\) is not a multiple of 'num_key_value_heads' \(5\)"),
    ({"head_dim": 65}, r"'head_dim' \(65\) must be even"),
    ({"num_hidden_layers": 0}, r"'num_hidden_layers' must be a whole number from 1 to 4096, but is 0"),
    ({"rms_norm_eps": -1}, r"'rms_norm_eps' must be a number above 0, but is -1"),
    ({"tie_word_embeddings": 1}, r"'tie_word_embeddings' must be true or false, but is 1"),
    (
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        r"rotary embedding 'longrope' in 'rope_scaling' is not",
    ),
    ({"rope_scaling": [1]}, r"'rope_scaling' must be an object"),
    (
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear"}},
        r"rope_parameters: 'factor' must be a number above 0, but is None",
    ),
    ({"rope_scaling": None, "rope_parameters": {**YARN, "truncate": "no"}}, r"'truncate' must be true or false"),
    ({"rope_scaling": {**V4["rope_scaling"], "high_freq_factor": 1.0}}, r"'high_freq_factor' \(1\) must be above"),  # type: ignore[dict-item]
    ({"partial_rotary_factor": 0.5}, r"partial rotary embedding"),
    ({"eos_token_id": 200000}, r"'eos_token_id' must hold token numbers from 0 to 128255, but holds 200000"),
    ({"eos_token_id": [True]}, r"'eos_token_id' must hold token numbers from 0 to 128255, but holds True"),
    (
        {"rope_scaling": {"factor": 4.0}, "rope_theta": "absent", "rope_parameters": YARN},
        r"'rope_scaling' goes before 'rope_parameters', but names no 'rope_type': name one\.",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
        r"'rope_theta' is 5, but 6 in 'rope_parameters': write the right one into 'rope_scaling'\.",
    ),
    ({"rope_parameters": [1]}, r"'rope_parameters' must be an object"),
    ({"torch_dtype": "float8_e4m3fn"}, r"'dtype' must be one of bfloat16, float16, float32, but is 'float8_e4m3fn'"),
]


@pytest.mark.parametrize("changes,message", BAD)
def test_bad_fields_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelSpec.from_folder(write(tmp_path, **changes))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ud800".encode("utf-16", "surrogatepass").hex(), "[" * 100_000])
def test_broken_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json (cannot be read as JSON|must hold a JSON object)"):
        ModelSpec.from_folder(tmp_path)


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        ModelSpec.from_folder(tmp_path)


def test_bad_eos_in_generation_config_names_that_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_config.json: 'eos_token_id' must hold"):
        ModelSpec.from_folder(write(tmp_path, {"eos_token_id": ["x"]}))
