"""The forward that measures on a GPU, in Triton's interpreter, against the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

pytest.importorskip("triton")

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import open_model
from morph_runtime.profile.cuda import CudaForward
from morph_runtime.profile.forward import CpuForward, Walk
from morph_runtime.profile.weights import CpuLayerStore, full_mix
from weights.tiny_checkpoint import DEFAULTS, make_model


def test_the_gpus_forward_gives_the_cpus_logits(tmp_path: Path) -> None:
    small = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    sliding = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 0}
    make_model(tmp_path, Qwen3ForCausalLM, Qwen3Config(**{**DEFAULTS, **small, **sliding}))
    config = EngineConfig.from_mapping({"model": {"path": str(tmp_path), "dtype": "float32"}})
    store = CpuLayerStore({"full": open_model(config, torch.device("cpu"))}, lambda words: None)
    tokens = [(7 * i) % 190 for i in range(24)]
    with torch.inference_mode():
        wanted = Walk(CpuForward(store, 24), store, tokens).run(full_mix(2))
        walk = Walk(CudaForward(store, 24), store, tokens)
        found = walk.run(full_mix(2))
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
        # Nothing that was returned has been changed by what ran after it.
        assert torch.equal(walk.run_changed(0, "full"), found)
