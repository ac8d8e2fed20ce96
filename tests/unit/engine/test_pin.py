"""A pinned rung: the engine starts at its level, with its KV capacity, and stays whatever the load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine.conftest import submit

if TYPE_CHECKING:
    from engine.conftest import EngineFactory


@pytest.mark.parametrize(
    ("ladder", "pin", "level"),
    [(["w4"], "full", 0), (["w4"], "w4", 4), (["w8", "w4"], "w8", 4), (["w8", "w4"], "w4", 8)],
)
def test_a_pinned_engine_starts_at_its_rung_and_no_load_moves_it(
    tiny_model: Path, engines: EngineFactory, ladder: list[str], pin: str, level: int
) -> None:
    engine = engines(
        tiny_model,
        morph={"ladder": ladder, "pin": pin, "mode": "performance", "interval_s": 0.001, "dwell_s": 0.0},
        memory={"kv_tokens": 128},
        model={"max_model_len": 96},
    )
    parts = engine.parts
    assert engine.level == level and set(parts.swapper.rungs) == {pin}
    assert parts.pool.capacity == parts.capacities[level]
    for key in range(1, 13):
        submit(engine, key, list(range(3, 43)), 20)
    tokens, levels = 0, set()
    while engine.has_requests:
        out = engine.step()
        for delta in out.tokens if out else ():
            tokens += len(delta.tokens)
            levels.update(delta.levels)
    assert tokens == 12 * 20 and levels == {level} and engine.level == level
    assert parts.scheduler.preemptions or pin != "full", "the load would have moved a controller that is awake"
    assert engine.stats().decision_counts == {}
