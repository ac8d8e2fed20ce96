"""Costs measured on a starting engine: the engine is as before, the model is kept and found again."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.conftest import EngineFactory, run_all, submit
from morph_runtime.config import EngineConfig
from morph_runtime.costs import measure as measuring
from morph_runtime.costs.__main__ import main
from morph_runtime.costs.cache import CostCache, cache_folder, identity
from morph_runtime.costs.held_out import check_held_out
from morph_runtime.costs.measure import measure
from morph_runtime.engine.core import Engine
from morph_runtime.errors import ConfigError
from morph_runtime.morph.costs import StepCosts
from morph_runtime.morph.levels import LevelPlan

PLAN = LevelPlan(range(4), ("w8", "w4"))
QUICK = {"mode": "balanced", "ladder": ["w8", "w4"], "costs": "auto", "cost_budget_s": 0.1}


def state_of(engine: Engine) -> list[Any]:
    parts = engine.parts
    weights = [parts.swapper.slot_bytes_of(layer).clone().numpy().tobytes() for layer in range(4)]
    pool = parts.pool
    stats = engine.stats()
    return [
        engine.level, weights, pool.capacity, pool.num_free, pool.num_cached, parts.arena.free_extents,
        stats.shifts_down, stats.shifts_up, stats.shifts_by_rung, stats.blocks_migrated, stats.steps,
        stats.prefix_queries,
    ]  # fmt: skip


def ticking() -> Callable[[], float]:
    """A clock of its own, so that no step's time depends on the machine."""
    return itertools.count(0.0, 0.001).__next__


def test_after_measuring_the_engine_is_as_it_was_and_serves_the_same(engines: EngineFactory, tiny_model: Path) -> None:
    engine, other = (engines(tiny_model, morph={"ladder": ["w8", "w4"]}) for _ in range(2))
    before = state_of(engine)
    measured = measure(engine.parts, PLAN, 60.0, ticking())
    rows = check_held_out(engine.parts, PLAN, measured.costs, 10.0, ticking())
    engine.check_integrity()
    assert state_of(engine) == before
    assert not measured.unreached
    assert {row.level for row in rows} == {0, 2, 4, 6, 8}
    for one in (engine, other):
        for key in range(4):
            submit(one, key, [5 + key] * 20, 8)
    assert run_all(engine) == run_all(other)


def test_every_step_of_the_measuring_holds_together(
    engines: EngineFactory, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from morph_runtime.models.batch import check_batch, step_batch

    engine = engines(tiny_model)
    parts, launch, sizes = engine.parts, engine.parts.runner.launch, set()

    def checked(batch: Any, rows: Any, previous: Any) -> Any:
        check_batch(step_batch(batch), 8, parts.max_model_len, parts.spec.vocab, parts.cache.mapped_blocks)
        assert batch.num_tokens <= 48 and len(rows) == batch.num_sequences <= 8
        sizes.add((batch.num_tokens, batch.num_sequences))
        return launch(batch, rows, previous)

    monkeypatch.setattr(parts.runner, "launch", checked)
    measure(parts, LevelPlan(range(4), ("w4",)), 60.0, ticking())
    assert {(1, 1), (8, 8), (48, 1)} <= sizes  # decodes, few and all; the longest chunk
    assert any(1 < sequences < tokens for tokens, sequences in sizes)  # both at once


def test_costs_are_measured_once_kept_and_found_at_the_next_start(
    engines: EngineFactory, tiny_model: Path, tmp_path: Path
) -> None:
    settings = {**QUICK, "cost_cache": str(tmp_path / "cache")}
    first = engines(tiny_model, morph=settings)
    assert first.parts.costs is not None
    (path,) = (tmp_path / "cache").iterdir()
    values = json.loads(path.read_text())
    values["costs"]["down_s"] = 123.0  # what no measuring finds
    path.write_text(json.dumps(values))
    second = engines(tiny_model, morph=settings)
    assert second.parts.costs is not None and second.parts.costs.down_s == 123.0
    other = engines(tiny_model, morph=settings, scheduler={"max_num_seqs": 4})
    assert other.parts.costs is not None and other.parts.costs.down_s != 123.0
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_costs_with_and_without_overlap_are_kept_apart(engines: EngineFactory, tiny_model: Path) -> None:
    off, on, default = (
        identity(engines(tiny_model, **given).parts, PLAN, tiny_model)
        for given in ({"overlap": "off"}, {"overlap": "on"}, {})
    )
    assert off != on and off == default, "what it comes to counts: on a CPU the default is off"


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"format": 1, "identity": {}, "costs": {}}', "costs", "identity"])
def test_a_damaged_or_foreign_file_is_ignored_with_one_line(
    engines: EngineFactory, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    engine = engines(tiny_model, morph={"ladder": ["w8", "w4"]})
    cache = CostCache(tmp_path, identity(engine.parts, PLAN, tiny_model))
    assert cache.load(PLAN) is None and not caplog.records  # nothing there is nothing to tell
    cache.save(measure(engine.parts, PLAN, 0.1, ticking()).costs, 0.1)
    assert cache.load(PLAN) is not None
    values = json.loads(cache.path.read_text())
    if damage in values:
        values[damage] = {**values[damage], "tokens": [3, 2], "device": "another"}
        damage = json.dumps(values)
    cache.path.write_text(damage)
    caplog.clear()
    assert cache.load(PLAN) is None
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_a_folder_that_cannot_be_written_costs_one_line_and_the_engine_serves(
    engines: EngineFactory, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    engine = engines(tiny_model, morph={**QUICK, "cost_cache": str(tmp_path / "file" / "cache")})
    assert engine.parts.costs is not None
    assert sum("cannot be kept" in record.message for record in caplog.records) == 1


def test_steps_correct_the_model_while_serving(engines: EngineFactory, tiny_model: Path, tmp_path: Path) -> None:
    engine = engines(tiny_model, morph={**QUICK, "cost_cache": str(tmp_path)})
    submit(engine, 0, [7] * 20, 10)
    run_all(engine)
    correction = engine.correction
    assert correction is not None and correction.steps == engine.stats().steps > 0
    assert correction.ratio(0) != 1
    assert engines(tiny_model).correction is None  # off: nothing is known, nothing is corrected


def test_the_default_folder_is_in_the_users_cache() -> None:
    assert cache_folder(EngineConfig(), {"XDG_CACHE_HOME": "/var/cache/u"}) == Path("/var/cache/u/morphserve/costs")
    relative = cache_folder(EngineConfig(), {"XDG_CACHE_HOME": "here"})  # which the standard says to ignore
    assert relative == Path.home() / ".cache/morphserve/costs"
    with pytest.raises(ConfigError, match=r"morph\.costs must be one of auto, off"):
        EngineConfig.from_mapping({"morph": {"costs": "sometimes"}})


def test_the_command_writes_a_profile_that_planning_can_read(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MORPH_MAX_NUM_SEQS", "8")
    out = tmp_path / "engine.json"
    times = ["--seconds", "30", "--held-out-seconds", "3"]
    assert main([str(tiny_model), f"--out={out}", "--ladder=w8", "--kv-tokens=512", "--threads=1", *times]) == 0
    profile = json.loads(out.read_text())
    plan = LevelPlan(profile["order"], profile["ladder"])
    costs = StepCosts.from_json(profile["costs"], plan)
    assert len(profile["capacities"]) == costs.max_level + 1 == 5
    assert profile["capacities"][4] > profile["capacities"][0] >= 512 // profile["block_tokens"]
    assert profile["max_num_seqs"] == 8
    assert {row["level"] for row in profile["held_out"]} == {0, 2, 4}
    assert main([str(tiny_model), f"--out={out}", "--ladder=w3"]) == 2
    assert "morph.ladder must be one of w8, w4" in capsys.readouterr().err


def test_a_model_too_slow_to_walk_down_is_measured_with_a_layer_and_the_rest_extrapolated(
    engines: EngineFactory, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, levels = engines(tiny_model, morph={"ladder": ["w8", "w4"]}), []
    shift = measuring._shift

    def slow(parts: Any, level: int) -> float:
        levels.append(level)
        shift(parts, level)
        return 1.0  # seconds, of a walk that may take 0.15

    monkeypatch.setattr(measuring, "_shift", slow)
    ticks = itertools.count()
    measured = measure(engine.parts, PLAN, 1.0, lambda: next(ticks) * (1e-3 if engine.level else 2e-3))
    assert levels == [1, 0]
    assert measured.unreached == ("w4",) and "w4 could not be measured" in caplog.text
    full, w8, w4 = measured.costs.whole_s
    # A layer halves the time, by this clock: four would leave nothing, and a tenth is the least that is believed.
    assert w8.tolist() == pytest.approx((0.1 * full).tolist()) and w4.tolist() == w8.tolist()
    assert measured.costs.downs_s == measured.costs.ups_s == (1.0, 1.0)
    engine.check_integrity()


def test_a_controller_that_is_off_needs_no_measuring(engines: EngineFactory, tiny_model: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "mode": "off", "cost_cache": str(tmp_path / "cache")}
    assert engines(tiny_model, morph=settings).parts.costs is None
    measured = engines(tiny_model, morph={**settings, "mode": "balanced"}).parts.costs
    assert measured is not None
    kept = engines(tiny_model, morph=settings).parts.costs
    assert kept is not None
    assert kept.to_json() == measured.to_json(), "what was measured earlier is used"
