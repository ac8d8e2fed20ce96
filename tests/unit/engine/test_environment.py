"""How many threads the engine takes, and what stands in its environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from morph_runtime.config import EngineConfig
from morph_runtime.engine.environment import cpu_threads, engine_variables, usable_cores


@pytest.mark.parametrize(
    ("quota", "expected"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 64), ("broken", 64)]
)
def test_a_containers_cpu_quota_counts_not_the_hosts_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "cpu.max").write_text(quota)
    assert usable_cores(tmp_path) == expected
    assert usable_cores(tmp_path / "nothing") == 64


def test_configured_threads_win_and_the_caches_are_bounded() -> None:
    config = EngineConfig.from_mapping({"kernels": {"threads": 3}})
    assert cpu_threads(config) == 3
    variables = engine_variables(config)
    assert variables["OMP_NUM_THREADS"] == "3"
    assert int(variables["LRU_CACHE_CAPACITY"]) <= 64
    assert int(variables["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) <= 64
