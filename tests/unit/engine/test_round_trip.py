"""Full precision → quantized → full precision leaves weights, KV blocks and the memory budget as they were."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine.conftest import run_all, submit
from weights.awq_packer import make_awq

if TYPE_CHECKING:
    from engine.conftest import EngineFactory
    from morph_runtime.engine.core import Engine


def weights_of(engine: Engine) -> list[bytes]:
    swapper = engine.parts.swapper
    return [swapper.slot_bytes_of(layer).numpy().tobytes() for layer in range(engine.parts.spec.layers)]


@pytest.mark.parametrize("ladder,awq", [(["w4"], False), (["w8"], False), (["w8", "w4"], False), (["w8", "w4"], True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_bit_equal_after_going_down_and_up(
    tiny_model: Path, engines: EngineFactory, tmp_path: Path, ladder: list[str], dtype: str, awq: bool
) -> None:
    quantized = {"awq_path": str(make_awq(tiny_model, tmp_path))} if awq else {}
    engine = engines(tiny_model, morph={"ladder": ladder}, model={"dtype": dtype, **quantized})
    top = len(engine.parts.capacities) - 1
    by_level = {}
    for level in range(top + 1):
        engine.set_level(level)
        engine.check_integrity()
        by_level[level] = weights_of(engine)
    for level in reversed(range(top + 1)):
        engine.set_level(level)
        engine.check_integrity()
        assert weights_of(engine) == by_level[level]


@pytest.mark.parametrize("ladder,kv", [(["w4"], "auto"), (["w8"], "fp8"), (["w8", "w4"], "auto"), (["w4"], "int8")])
def test_capacity_at_each_level_is_what_the_ledger_promised_in_both_directions(
    tiny_model: Path, engines: EngineFactory, ladder: list[str], kv: str
) -> None:
    engine = engines(tiny_model, morph={"ladder": ladder}, memory={"kv_dtype": kv})
    parts = engine.parts
    levels = range(len(parts.capacities))
    for level in [*levels, *reversed(levels)]:
        engine.set_level(level)
        assert parts.pool.capacity == parts.capacities[level]
    assert list(parts.capacities) == sorted(parts.capacities)
    assert parts.capacities[-1] > parts.capacities[0]


@pytest.mark.parametrize("kv", ["auto", "fp8", "int8"])
def test_kv_content_survives_growth_shrinking_and_migration(tiny_model: Path, engines: EngineFactory, kv: str) -> None:
    engine = engines(tiny_model, memory={"kv_tokens": 256, "kv_dtype": kv})
    parts = engine.parts
    top = len(parts.capacities) - 1
    engine.set_level(top)
    for key in range(6):
        submit(engine, key, [1 + key] * 40, 60)
    while parts.scheduler.num_waiting or min(r.output_len for r in parts.scheduler.running) < 3:
        engine.step(decide=False)
    for key in range(5):  # what is left lives in high blocks
        engine.cancel(key)
    engine.step(decide=False)
    survivor = parts.scheduler.running[0]
    assert max(survivor.blocks) >= parts.capacities[0], "the test needs live blocks in the tail"
    before = parts.cache.digest(survivor.blocks)
    old_blocks = list(survivor.blocks)
    engine.set_level(0)
    assert parts.resizer.blocks_migrated > 0
    assert list(survivor.blocks) != old_blocks
    assert parts.cache.digest(survivor.blocks) == before
    engine.set_level(top)
    assert parts.cache.digest(survivor.blocks) == before
    run_all(engine)


def test_a_down_shift_works_with_every_block_live_and_an_up_shift_waits_for_room(
    tiny_model: Path, engines: EngineFactory
) -> None:
    engine = engines(tiny_model, memory={"kv_tokens": 256})
    parts = engine.parts
    everything = parts.pool.allocate(parts.pool.num_free)
    top = len(parts.capacities) - 1
    engine.set_level(top)
    assert parts.pool.capacity == parts.capacities[top]
    more = parts.pool.allocate(parts.pool.num_free)
    engine.set_level(0)
    assert engine.level == top, "nothing live may be lost"
    assert parts.shifter.counters.refused == 1
    parts.pool.free(everything + more)
    engine.set_level(0)
    assert engine.level == 0


def test_tokens_flow_while_levels_change_every_few_steps(tiny_model: Path, engines: EngineFactory) -> None:
    engine = engines(tiny_model, morph={"ladder": ["w8", "w4"]}, memory={"kv_tokens": 256})
    top = len(engine.parts.capacities) - 1
    for key in range(12):
        submit(engine, key, [3 + key] * (5 + 7 * key % 60), 30)

    def wander(step: int) -> None:
        engine.parts.shifter.target = (step // 3 * 5) % (top + 1)

    tokens = run_all(engine, wander)
    assert {key: len(t) for key, t in tokens.items()} == dict.fromkeys(range(12), 30)
    assert engine.parts.shifter.counters.up > 0
    assert engine.parts.shifter.counters.down > 0
