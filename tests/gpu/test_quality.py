"""Quality by level on a GPU: against the CPU's figures, and W8 and W4 as the engine serves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import open_device, open_model
from morph_runtime.profile.forward import CpuForward
from morph_runtime.profile.quality import measure
from morph_runtime.profile.weights import CpuLayerStore, Form, Mix
from quality.tiny_session import random_windows
from weights.tiny_checkpoint import make_llama


def test_the_gpus_figures_are_those_of_the_cpu(tmp_path: Path) -> None:
    from morph_runtime.profile.cuda import CudaForward, CudaLayerStore

    make_llama(tmp_path, num_hidden_layers=3, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    windows = random_windows()
    settings = {"model": {"path": str(tmp_path), "dtype": "bfloat16"}, "morph": {"ladder": ["w8", "w4"]}}
    forms: tuple[Form, ...] = ("full", "w8", "w4")
    mixes: list[Mix] = [("w8", "w8", "w8"), ("w4", "w4", "w4"), ("full", "w4", "w8")]
    host = CpuLayerStore(
        dict.fromkeys(forms, open_model(EngineConfig.from_mapping(settings), torch.device("cpu"))), lambda words: None
    )
    wanted = measure(CpuForward(host, windows.length), host, windows, mixes)
    config = EngineConfig.from_mapping({**settings, "device": "cuda"})
    device = open_device(config).torch_device
    store = CudaLayerStore(dict.fromkeys(forms, open_model(config, device)), device, lambda words: None)
    found = measure(CudaForward(store, windows.length), store, windows, mixes)
    full: Mix = ("full", "full", "full")
    assert found[full].loss == pytest.approx(wanted[full].loss, abs=0.02)
    # W4 is the same rounding on both; W8 is FP8 on a GPU, coarser than int8.
    assert found[mixes[1]].kl == pytest.approx(wanted[mixes[1]].kl, rel=0.3)
    assert 0 < found[mixes[0]].kl < found[mixes[1]].kl
