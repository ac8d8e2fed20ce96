"""Steps with prompt tokens layer by layer, in the usual room or in the largest: between rungs, and crowded ones at any
level."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.conftest import make_model, run_all, submit
from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.engine.cuda_attention import Room, rooms

SEQUENCES, TOKENS = 160, 256
LEVEL = 2
"""Of 4 layers."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With this seed CROWD's two best tokens are 1e-3 apart or more at full precision; float32 is off by 3e-5."""
    return make_model(tmp_path_factory.mktemp("model"), kv_heads=2, seed=10)


def build(model: Path, device: str) -> Engine:
    """So many sequences that a step may need the largest room; float32, so that rounding chooses no token."""
    return build_engine(EngineConfig.from_mapping({
        "device": device,
        "model": {"path": str(model), "dtype": "float32"},
        "memory": {"kv_tokens": 16384, "block_tokens": 16},
        "scheduler": {"max_num_seqs": SEQUENCES, "max_num_batched_tokens": TOKENS},
        "cache": {"prefix": False},
        "morph": {"mode": "off", "ladder": ["w8", "w4"], "costs": "off"},
        "kernels": {"threads": 1},
        "check_integrity": True,
    }))  # fmt: skip


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    engine = build(model, "cuda")
    engine.set_level(LEVEL)
    yield engine
    engine.close()


def tokens_of(engine: Engine, prompts: list[list[int]]) -> tuple[dict[int, list[int]], set[Room]]:
    """What comes of prompts that are there at once, and the rooms in which layers ran."""
    runner: Any = engine.parts.runner
    graphs, seen = runner._graphs, set()
    replay = graphs.replay

    def noted(key: tuple[Any, ...]) -> None:
        if key[0] == "step" and len(key) == 5:
            seen.add(key[2])
        replay(key)

    graphs.replay = noted
    try:
        for key, prompt in enumerate(prompts):
            submit(engine, key, prompt, 8)
        return run_all(engine), seen
    finally:
        del graphs.replay


FEW = [[(7 * key + 3 * i) % 190 + 1 for i in range(9 + 17 * key)] for key in range(6)]
CROWD = [[(7 * key + 3 * i) % 190 + 1 for i in range(2 + key % 5)] for key in range(SEQUENCES - 10)]


@pytest.mark.parametrize("prompts", [FEW, CROWD], ids=["few", "crowd"])
def test_the_usual_room_gives_the_tokens_of_the_largest(
    engine: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, seen = tokens_of(engine, prompts)
    usual, largest = ({rooms(size, SEQUENCES)[at] for size in engine.parts.runner.mixed_step_sizes} for at in (0, -1))
    assert usual.isdisjoint(largest)
    assert seen & (usual if prompts is FEW else largest), "the test needs steps of this kind"
    monkeypatch.setattr(engine.parts.runner, "_roomy_steps", frozenset())
    expected, seen = tokens_of(engine, prompts)
    assert seen <= largest
    assert found == expected


@pytest.mark.parametrize("prompts", [FEW, CROWD], ids=["few", "crowd"])
def test_between_rungs_steps_in_graphs_give_the_tokens_of_launches(
    engine: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = tokens_of(engine, prompts)
    runner: Any = engine.parts.runner
    monkeypatch.setattr(runner, "_run", lambda key, piece, *arguments: piece(*arguments))
    for key, prompt in enumerate(prompts):
        submit(engine, key, prompt, 8)
    assert run_all(engine) == found


def test_crowded_steps_at_full_precision_give_the_tokens_of_the_cpu(engine: Engine, model: Path) -> None:
    cpu = build(model, "cpu")
    try:
        for key, prompt in enumerate(CROWD):
            submit(cpu, key, prompt, 8)
        expected = run_all(cpu)
    finally:
        cpu.close()
    engine.set_level(0)
    try:
        found, seen = tokens_of(engine, CROWD)
    finally:
        engine.set_level(LEVEL)
    assert seen, "the test needs steps that the usual room does not hold"
    assert found == expected
