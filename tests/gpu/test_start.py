"""Starts on a GPU: one that fails half-way gives everything back, and a model needs no weights to be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.conftest import run_all, submit
from engine.test_dummy import SHAPE
from morph_runtime.config import EngineConfig
from morph_runtime.engine import build
from morph_runtime.engine.build import build_engine

SPARE = 64 << 20
"""Bytes that libraries and PyTorch's pools may keep from the first engine on."""


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    return {
        "device": "cuda",
        "model": {"path": str(tmp_path), "load_format": "dummy", "dtype": "bfloat16"},
        "memory": {"kv_tokens": 1_000_000},  # 0.7 GiB
        "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 48},
        "morph": {"mode": "off", "ladder": ["w8", "w4"]},
    }


def test_a_model_without_weights_runs_at_every_rung(settings: dict[str, Any]) -> None:
    engine = build_engine(EngineConfig.from_mapping(settings))
    try:
        for level in (0, 3, 6, 0):
            engine.set_level(level)
            submit(engine, level + 1, [5, 9, 23, 7] * 5, 24)
            assert len(run_all(engine)[level + 1]) == 24
            engine.check_integrity()
    finally:
        engine.close()


def test_without_a_budget_the_gpu_is_nearly_all_the_engines(settings: dict[str, Any]) -> None:
    del settings["memory"], settings["scheduler"]
    planned = build.plan_engine(EngineConfig.from_mapping(settings))
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0.85 * total < planned.config.memory.budget_gib * 2**30 < 0.95 * total
    assert planned.config.scheduler.max_num_seqs == 256 and planned.config.scheduler.max_num_batched_tokens == 2048


def test_a_start_that_fails_gives_memory_back(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed(Exception):
        pass

    def free_bytes() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    build_engine(EngineConfig.from_mapping(settings)).close()  # what the first engine of a process leaves for ever
    before, during = free_bytes(), []

    def fail(*_: object) -> None:
        during.append(free_bytes())
        raise Failed

    monkeypatch.setattr(build, "BlockPool", fail)
    with pytest.raises(Failed):
        build_engine(EngineConfig.from_mapping(settings))
    assert before - during[0] > 8 * SPARE, "the test needs an arena that shows"
    assert free_bytes() > before - SPARE


def test_a_capture_that_fails_does_not_spoil_the_stream() -> None:
    from morph_runtime.engine.cuda_graphs import GraphSet

    stream, data = torch.cuda.Stream(), torch.zeros(8, device="cuda")
    graphs = GraphSet()

    def fail() -> None:
        data.add_(1)
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        graphs.capture((1, "bad"), stream, fail)
    with torch.cuda.stream(stream):
        data.add_(2)
    graphs.capture((1, "good"), stream, lambda: data.add_(4))
    graphs.replay((1, "good"))
    torch.cuda.synchronize()
    assert data.tolist() == [6.0] * 8
    graphs.close()
