"""`model.load_format: dummy`: an engine on a model that is nothing but a config.json; and a start that fails."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from engine.conftest import EngineFactory, run_all, submit
from morph_runtime.config import EngineConfig
from morph_runtime.engine import build
from morph_runtime.engine.build import build_engine
from morph_runtime.errors import ConfigError

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 200, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
DUMMY = {"model": {"load_format": "dummy"}, "morph": {"ladder": ["w8", "w4"]}}


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    return tmp_path


def test_a_model_without_weights_serves_the_same_random_ones_at_every_start(
    shape: Path, engines: EngineFactory
) -> None:
    answers = []
    for level in (0, 0, 6):
        engine = engines(shape, **DUMMY)
        engine.set_level(level)
        submit(engine, 1, [5, 9, 23, 7] * 5, 24, temperature=1.0, seed=3)
        answers.append(run_all(engine)[1])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 2
    assert len(answers[2]) == 24


def test_its_quantized_layers_are_those_of_its_full_precision(shape: Path, engines: EngineFactory) -> None:
    engine = engines(shape, **DUMMY)
    swapper = engine.parts.swapper
    full = [linear.tensors["weight"].clone() for linear in swapper.layers[0].linears]
    engine.set_level(6)
    for weight, linear in zip(full, swapper.layers[0].linears, strict=True):
        off = (linear.kernel.dequantize(linear.tensors) - weight).norm() / weight.norm()
        assert 0 < off < 0.2


def test_settings_that_name_weights_are_refused(shape: Path, engines: EngineFactory) -> None:
    with pytest.raises(ConfigError, match=r"load_format is dummy, .* but model\.awq_path is set"):
        engines(shape, model={"load_format": "dummy", "awq_path": "x"}, morph={"ladder": ["w4"]})


def test_a_start_that_fails_gives_memory_and_threads_back(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_arenas() -> set[str]:
        return {name for name in os.listdir("/proc/self/fd") if "memfd" in _target(name)}

    class Failed(Exception):
        pass

    def fail(*_: object) -> None:
        # The layers are filled and the runner is made: all that can be undone is there.
        assert open_arenas() > before, "the test needs an arena that is made with a memfd"
        raise Failed

    before, threads = open_arenas(), set(threading.enumerate())
    monkeypatch.setattr(build, "BlockPool", fail)
    values = {"model": {"path": str(shape), "load_format": "dummy", "dtype": "float32"}, "memory": {"kv_tokens": 512}}
    with pytest.raises(Failed):
        build_engine(EngineConfig.from_mapping(values))
    assert open_arenas() == before
    assert {thread for thread in threading.enumerate() if thread.name.startswith("layer-fill")} <= threads


def _target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:  # the folder's own
        return ""


def test_random_weights_have_the_spread_that_keeps_activations_in_range(shape: Path, engines: EngineFactory) -> None:
    engine = engines(shape, **DUMMY)
    qkv, layer = engine.parts.swapper.layers[1].qkv, engine.parts.swapper.layers[1]
    assert float(qkv.tensors["weight"].float().std()) == pytest.approx(0.02, rel=0.05)
    assert qkv.bias is not None and not qkv.bias.any(), "Qwen2 has biases: they are 0"
    assert torch.equal(layer.input_norm, torch.ones_like(layer.input_norm))
