"""The real controller over simulated engines: it leaves a steady load alone, does not flap, and always comes back.

Short, for every change; over half an hour: `python bench/simulate/steady.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from morph_runtime.config import MorphSettings
from morph_runtime.morph.forecast import Forecaster, Futures
from morph_runtime.morph.load import Load, Outer, Typical
from morph_runtime.simulate.arrivals import Arrivals, steady
from morph_runtime.simulate.engine_profile import EngineProfile, read_profile
from morph_runtime.simulate.pilot import SignalPath
from morph_runtime.simulate.result import Result
from morph_runtime.simulate.scenario import Policy, simulate
from morph_runtime.slo import SloClass

PROFILES = Path(__file__).resolve().parents[3] / "bench" / "simulate" / "profiles"
LATE = SignalPath(delay_s=0.2)
WRONG = [(0.2,), (-0.2, 0.2, 0.2), (0.2, -0.2, -0.2)]
"""Errors of the cost model: all times, or full precision against the quantized rungs."""


@pytest.fixture(scope="module")
def kv_bound() -> EngineProfile:
    """Llama-2-7B on an H200 with 24 GiB: KV runs out before computing does."""
    return read_profile(PROFILES / "h200_llama-2-7b_24gib.json")


@pytest.fixture(scope="module")
def compute_bound() -> EngineProfile:
    """Llama-3-8B there, with long prompts."""
    return read_profile(PROFILES / "h200_llama-3-8b_24gib.json")


def capacity(profile: EngineProfile, prompt: int, output: int) -> float:
    """Requests per second that full precision serves when there is always more to do."""
    count = 2000
    ones = np.ones(count, dtype=np.int64)
    rush = simulate(profile, Arrivals(np.zeros(count), prompt * ones, output * ones), Policy("full", 0))
    ends = np.sort(rush.e2e_s)
    return 0.8 * count / float(ends[9 * count // 10] - ends[count // 10])


def morphing(mode: str = "balanced", error: tuple[float, ...] = (0.0,), path: SignalPath = LATE) -> Policy:
    return Policy(mode, None, MorphSettings(mode=mode, ladder=("w8", "w4")), path, error)


def burst(seconds: float, rate: float, every: float, prompt: int, output: int, seed: int) -> Arrivals:
    """Poisson arrivals, with as many again within two seconds of each `every`."""
    rng = np.random.default_rng(seed)
    quiet = np.cumsum(rng.exponential(1 / rate, int(seconds * rate)))
    rush = [start + rng.uniform(0, 2, int(rate * every)) for start in np.arange(every, seconds, every)]
    times = np.sort(np.concatenate([quiet, *rush]))
    ones = np.ones(len(times), dtype=np.int64)
    return Arrivals(times, prompt * ones, output * ones, "bursts")


def returned_s(result: Result) -> float:
    """Seconds from the end of the last request to level 0; infinity if it was not reached."""
    level = result.changes[-1][1] if result.changes else 0
    return np.inf if level else max(0.0, result.changes[-1][0] - result.idle_s) if result.changes else 0.0


@pytest.mark.parametrize("rung", ["full", "w8", "w4"])
@pytest.mark.parametrize("count", [100, 300])
def test_a_queue_that_waits_for_blocks_is_forecast_to_take_as_long_as_it_takes(
    rung: str, count: int, kv_bound: EngineProfile
) -> None:
    """At each rung, or one would be preferred to another for the forecast's own error."""
    level, ones = kv_bound.level_of(rung), np.ones(count, dtype=np.int64)
    rush = simulate(kv_bound, Arrivals(np.zeros(count), 512 * ones, 256 * ones), Policy(rung, level))
    waits = Load(
        now_s=0.0, level=level, capacities=kv_bound.capacities, used=0, head_fits=True, block_tokens=16,
        max_running=256, max_batched_tokens=2048, typical=Typical(512, 0, 256, 48, 2.0), outer=Outer(count),
    )  # fmt: skip
    futures = Futures(np.array([level]), np.ones(1), np.zeros(1, dtype=np.bool_), np.ones(1), np.ones(1))
    found = Forecaster(kv_bound.costs, [SloClass("", 2.0, None)], 2048).forecast(waits, futures)
    assert float(found.ttft_s[0]) == pytest.approx(float(rush.ttft_s.max()), rel=0.3)


@pytest.mark.parametrize("error", [(0.0,), *WRONG], ids=str)
def test_a_steady_load_at_60_percent_of_kv_capacity_moves_nothing(
    error: tuple[float, ...], kv_bound: EngineProfile
) -> None:
    load = steady(0.6 * capacity(kv_bound, 512, 256), 20, 512, 256, seed=1)
    assert simulate(kv_bound, load, morphing(error=error)).changes == []


def test_a_steady_load_at_60_percent_of_compute_capacity_moves_nothing(compute_bound: EngineProfile) -> None:
    load = steady(0.6 * capacity(compute_bound, 2048, 32), 20, 2048, 32, seed=1)
    assert simulate(compute_bound, load, morphing()).changes == []


@pytest.mark.parametrize("bound", ["kv", "compute"])
def test_above_capacity_the_level_turns_at_most_twice_a_minute(
    bound: str, kv_bound: EngineProfile, compute_bound: EngineProfile
) -> None:
    profile, prompt, output = (kv_bound, 512, 256) if bound == "kv" else (compute_bound, 2048, 32)
    for seed in (1, 2):
        load = steady(1.1 * capacity(profile, prompt, output), 90, prompt, output, seed=seed)
        result = simulate(profile, load, morphing())
        assert result.changes  # it has something to do
        assert result.most_reversals(until_s=float(load.arrival_s[-1])) <= 2


@pytest.mark.parametrize("mode", ["accuracy", "balanced", "performance"])
def test_after_a_burst_level_0_is_back_within_ten_seconds(mode: str, kv_bound: EngineProfile) -> None:
    load = burst(20, 4.0, 19.0, 512, 256, seed=2)
    result = simulate(kv_bound, load, morphing(mode))
    assert result.changes
    assert returned_s(result) <= 10.0


def test_after_a_high_burst_full_precision_is_back_while_the_calm_still_has_requests(
    compute_bound: EngineProfile,
) -> None:
    """What has passed does not keep the level down: 10 s after the last of the burst is served."""
    quiet, rush = steady(3.0, 50, 2048, 32, seed=4), steady(30.0, 8, 2048, 32, seed=5)
    times = np.sort(np.concatenate([quiet.arrival_s, 10 + rush.arrival_s]))
    ones = np.ones(len(times), dtype=np.int64)
    result = simulate(compute_bound, Arrivals(times, 2048 * ones, 32 * ones), morphing())
    served = float((result.arrival_s + result.ttft_s)[result.ttft_s > 1.0].max())
    assert result.changes and result.changes[-1][1] == 0
    assert result.changes[-1][0] < min(served + 10.0, float(result.arrival_s[-1]))


def test_no_layer_changes_where_a_change_gains_nothing(kv_bound: EngineProfile) -> None:
    """Levels that are neither faster nor larger, under a load that no level can serve."""
    barren = kv_bound.without_growth().without_precision()
    result = simulate(barren, burst(20, 8.0, 6.0, 512, 256, seed=3), morphing("performance"))
    assert result.ttft_s.max() > 2.0
    assert result.changes == []


def test_a_mode_that_is_off_keeps_level_0(kv_bound: EngineProfile) -> None:
    load = burst(20, 8.0, 6.0, 512, 256, seed=3)
    result = simulate(kv_bound, load, morphing("off"))
    static = simulate(kv_bound, load, Policy("full", 0))
    assert result.changes == []
    np.testing.assert_allclose(result.ttft_s, static.ttft_s)
