"""With a cost model: the least degradation that meets the SLOs, none that buys nothing, and back as soon as may be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from morph.closed_loop import ClosedLoop, Job, make_costs, make_loop, steady
from morph_runtime.config import MorphSettings
from morph_runtime.morph.controller import Controller
from morph_runtime.morph.forecast import Forecast, Forecaster, Futures
from morph_runtime.morph.load import Load, Outer, Running, Typical, Waiting
from morph_runtime.slo import SloClass

KV_RATE = 8.4
"""Requests of 160 + 96 tokens per second that the model of `make_loop` serves at level 0; blocks are what it lacks."""
COMPUTE_RATE = 19.6
"""The same of 400 + 16 tokens with 1,000 blocks; steps are what it lacks."""


def kv(share: float, seconds: float, seed: int = 0, start_s: float = 0.0) -> list[Job]:
    return steady(share * KV_RATE, seconds, 160, 96, seed, start_s)


def compute(share: float, seconds: float, seed: int = 0, start_s: float = 0.0) -> list[Job]:
    return steady(share * COMPUTE_RATE, seconds, 400, 16, seed, start_s)


def load(pending: int = 0, rate: float = 0.0, count: int = 10, used: int = 150, level: int = 0) -> Load:
    """`count` decoding requests and a queue, with 200 blocks at level 0 and 12 more per level."""
    ones = np.ones(count, dtype=np.int64)
    running = Running(
        200 * ones, ones, np.linspace(5.0, 95.0, count), np.full(count, used // max(count, 1)), np.ones(count),
        ones.astype(np.bool_), 0 * ones,
    )  # fmt: skip
    return Load(
        now_s=0.0, level=level, capacities=200 + 12 * np.arange(17), used=used, head_fits=pending == 0,
        block_tokens=16, max_running=64, max_batched_tokens=512, running=running, typical=Typical(160, 0, 96, 17, 2.0),
        arrivals_per_s=rate, mean_arrivals_per_s=rate, outer=Outer(pending, 0.1),
    )  # fmt: skip


def forecast(reading: Load, maker: Forecaster | None = None, bound: float = 1.0) -> Forecast:
    maker = maker or Forecaster(make_costs(), [SloClass("", 2.0)], 512)
    count = len(reading.capacities)
    bounds = np.full(count, bound)
    return maker.forecast(
        reading, Futures(np.arange(count), np.ones(count), np.zeros(count, dtype=np.bool_), bounds, bounds)
    )


# -- the forecast ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 200), st.floats(0, 20))
@example(8, 1, 0.0)  # a line that ends early in a long interval
@example(24, 1, 0.0)  # one whose last request just does not fit at level 14
@settings(max_examples=40, deadline=None)
def test_more_that_waits_never_lets_anybody_wait_less(pending: int, more: int, rate: float) -> None:
    few, many = forecast(load(pending, rate)), forecast(load(pending + more, rate))
    coarse = 0.1  # seconds
    assert (many.ttft_s >= 0.95 * few.ttft_s - coarse).all()


def test_who_is_not_reached_within_the_horizon_is_not_said_to_be() -> None:
    maker = Forecaster(make_costs(), [SloClass("", 2.0)], 512)
    beyond = 0
    for pending in range(5, 40):
        reading = dataclasses.replace(load(pending), typical=Typical(160, 0, 5000, 320, 100.0))
        longest_s = forecast(reading, maker).ttft_s[0]
        assert not maker.edges[-2] < longest_s < maker.edges[-1]
        beyond += longest_s >= maker.edges[-1]
    assert beyond


@given(st.integers(0, 200), st.floats(0, 20))
@settings(max_examples=40, deadline=None)
def test_three_times_the_blocks_at_the_same_speed_never_make_it_worse(pending: int, rate: float) -> None:
    same = Forecaster(make_costs(1.0, 1.0), [SloClass("", 2.0)], 512)
    reading = load(pending, rate)
    less = forecast(reading, same)
    more = forecast(dataclasses.replace(reading, capacities=3 * reading.capacities), same)
    assert (more.score <= less.score * 1.05 + 0.02).all()


@pytest.mark.parametrize("pending", [0, 5, 20, 100])
def test_the_forecast_is_near_what_comes_of_it(pending: int) -> None:
    """A queue of equal requests on an idle engine: the last one's TTFT, forecast and simulated."""
    loop = make_loop(base=400)
    loop.fixed = 0
    jobs = [Job(0.0, 160, 96) for _ in range(pending + 1)]
    loop.run(jobs, 60.0)
    reading = dataclasses.replace(load(pending + 1, count=0, used=0), capacities=400 + 12 * np.arange(17))
    found = forecast(dataclasses.replace(reading, outer=Outer(pending + 1, 0.0))).ttft_s[0]
    assert found == pytest.approx(max(j.first_s for j in jobs), rel=0.4, abs=0.08)


def test_a_burst_that_has_passed_is_not_expected_back() -> None:
    """After a burst the mean of many seconds is far above what comes now."""
    quiet = load(0, 3.0)
    after = dataclasses.replace(quiet, mean_arrivals_per_s=20.0)
    np.testing.assert_array_equal(forecast(after).ttft_s, forecast(quiet).ttft_s)


def test_the_time_of_the_shift_itself_counts() -> None:
    reading = load(60, 8.0)
    quick = Forecaster(make_costs(), [SloClass("", 2.0)], 512)
    slow = Forecaster(dataclasses.replace(make_costs(), down_s=2.0), [SloClass("", 2.0)], 512)
    assert forecast(reading, slow).ttft_s[16] > forecast(reading, quick).ttft_s[16] + 0.3


def test_a_class_with_a_time_per_token_is_heard() -> None:
    patient = Forecaster(make_costs(), [SloClass("", 2.0, 0.2)], 512)
    strict = Forecaster(make_costs(), [SloClass("", 2.0, 0.01)], 512)
    assert forecast(load(), patient).score[0] == 0 < forecast(load(), strict).score[0]
    assert forecast(load(), strict).score[16] < forecast(load(), strict).score[0]


# -- the controller ----------------------------------------------------------------------------------------------------


def test_a_burst_that_waits_for_blocks_is_met_and_full_precision_comes_back() -> None:
    jobs = kv(0.4, 40) + kv(1.6, 10, seed=3, start_s=10)
    static = make_loop()
    static.fixed = 0
    before = static.run([Job(j.arrival_s, j.prompt, j.output) for j in jobs], 40.0)
    loop = make_loop()
    after = loop.run(jobs, 40.0)
    assert before.p95() > 2.0 > after.p95()
    assert after.deepest > 0 and loop.level == 0
    assert all(level == 0 for at, level in after.levels if at < 10)
    assert all(level == 0 for at, level in after.levels if at > 35), "10 s after the burst and what it left"


def test_a_burst_that_waits_for_compute_goes_down_where_that_is_faster() -> None:
    jobs = compute(0.4, 30) + compute(1.4, 6, seed=3, start_s=8)
    static = make_loop(base=1000)
    static.fixed = 0
    before = static.run([Job(j.arrival_s, j.prompt, j.output) for j in jobs], 30.0)
    loop = make_loop(base=1000)
    after = loop.run(jobs, 30.0)
    assert after.p95() < 0.8 * before.p95() and loop.level == 0


def test_it_holds_where_the_deeper_rung_is_slower_and_says_why() -> None:
    loop = make_loop(base=1000, costs=make_costs(0.9, 1.3))
    out = loop.run(compute(1.4, 15), 15.0)
    assert out.deepest == 0
    assert loop.controller.counts["hold/no_gain"] > 0 and not loop.controller.slo_feasible


@given(st.integers(0, 300), st.floats(0, 30), st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_it_never_goes_down_where_nothing_is_gained(pending: int, rate: float, count: int) -> None:
    costs = make_costs(1.0, 1.0)
    subject = Controller(MorphSettings(mode="performance"), costs.max_level, costs, 512)
    reading = dataclasses.replace(load(pending, rate, count), capacities=np.full(17, 200))
    assert [subject.decide(dataclasses.replace(reading, now_s=0.1 * tick)) for tick in range(10)] == [0] * 10


@pytest.mark.parametrize("make", [kv, compute], ids=["blocks", "compute"])
def test_a_load_of_six_tenths_is_left_alone(make: object) -> None:
    out = make_loop(base=200 if make is kv else 1000).run(make(0.6, 25, seed=5), 25.0)  # type: ignore[operator]
    assert out.deepest == 0


@pytest.mark.parametrize("scale", [0.8, 1.2])
@pytest.mark.parametrize("make", [kv, compute], ids=["blocks", "compute"])
def test_a_load_just_above_capacity_makes_no_flapping_with_wrong_costs_and_late_signals(
    make: object, scale: float
) -> None:
    loop = make_loop(base=200 if make is kv else 1000, known=make_costs(scale=scale), late_s=0.2)
    out = loop.run(make(1.1, 40, seed=1), 40.0)  # type: ignore[operator]
    assert out.reversals() <= 2
    assert out.p95() < 2.0


@given(st.integers(0, 10_000), st.floats(0.5, 2.5), st.floats(1, 4), st.booleans())
@settings(max_examples=4, deadline=None)
def test_it_always_returns_to_full_precision(seed: int, height: float, seconds: float, blocks: bool) -> None:
    make = kv if blocks else compute
    loop = make_loop(base=200 if blocks else 1000)
    loop.run(make(height, seconds, seed=seed), 40.0)
    assert loop.level == 0


def test_the_least_level_that_suffices_is_taken() -> None:
    costs = make_costs()
    levels = []
    for pending in (0, 15, 20):
        subject = Controller(MorphSettings(), costs.max_level, costs, 512)
        levels.append(
            max(subject.decide(dataclasses.replace(load(pending, 4.0), now_s=0.1 * tick)) for tick in range(8))
        )
    assert levels[0] == 0 < levels[1] < levels[2]


def gone_to(mode: str, rate: float, mean: float, pending: int = 2, used: int = 190, seconds: float = 0.8) -> int:
    """The deepest level of so long a time under one reading; `rate` and `mean` in requests per second."""
    costs = make_costs()
    subject = Controller(MorphSettings(mode=mode), costs.max_level, costs, 512)
    reading = dataclasses.replace(load(pending, rate, used=used), mean_arrivals_per_s=mean)
    return max(subject.decide(dataclasses.replace(reading, now_s=0.1 * tick)) for tick in range(round(10 * seconds)))


def test_a_burst_that_begins_to_wait_is_not_waited_out() -> None:
    """Its requests would still be served in time if it passed, but not if it lasts: two wait, blocks are short."""
    reading = dataclasses.replace(load(2, 14.0, used=190), mean_arrivals_per_s=3.0)
    assert forecast(reading).score[0] == 0
    assert gone_to("balanced", 14.0, 3.0, seconds=0.1) > 0


def test_the_same_rate_is_let_be_while_nothing_waits_and_blocks_suffice() -> None:
    assert gone_to("performance", 14.0, 3.0, pending=0, used=20) == 0


def test_what_may_be_noise_of_a_steady_load_is_not_believed() -> None:
    """Two standard deviations above the mean of a load that level 0 serves, and the same rate out of a calm."""
    rate, mean = 12.5, 9.0
    assert gone_to("balanced", rate, mean) == 0 < gone_to("balanced", rate, mean / 3)


def test_a_mode_that_cares_more_for_latency_goes_earlier_and_deeper() -> None:
    reached = [gone_to(mode, 14.0, 3.0) for mode in ("accuracy", "balanced", "performance")]
    assert 0 < reached[0] < reached[1] < reached[2]
    assert gone_to("accuracy", 14.0, 3.0, seconds=0.4) == 0 < gone_to("balanced", 14.0, 3.0, seconds=0.4)


def test_each_class_is_held_to_its_own_target() -> None:
    """The same queue: of a patient class it is let wait, of an impatient one not."""

    def deepest(slo: int) -> int:
        costs = make_costs()
        subject = Controller(MorphSettings(slo_classes=("fast=0.5", "batch=60")), costs.max_level, costs, 512)
        shares = np.eye(3)[slo]
        reading = load(40, 4.0)
        reading = dataclasses.replace(reading, typical=dataclasses.replace(reading.typical, slo_shares=shares))
        return max(subject.decide(dataclasses.replace(reading, now_s=0.1 * tick)) for tick in range(8))

    assert deepest(2) == 0 < deepest(1)


def test_live_blocks_are_never_driven_out_by_a_step_up() -> None:
    costs = make_costs()
    subject = Controller(MorphSettings(), costs.max_level, costs, 512)
    held = load(0, 0.0, count=10, used=300, level=12)
    chosen = {subject.decide(dataclasses.replace(held, now_s=0.1 * tick)) for tick in range(200)}
    assert min(chosen) >= 9, "level 9 has 308 blocks"


def test_modes_and_cap_are_limits_that_can_be_changed() -> None:
    loop = make_loop(MorphSettings(max_level_share=0.25))
    assert loop.run(kv(1.8, 15), 15.0).deepest == 4
    loop.controller.set_mode(cap=0.0)
    assert loop.controller.decide(load(50, 9.0, level=4)) == 0
    loop.controller.set_mode("accuracy", 1.0)
    assert loop.controller.deepest == 8
    loop.controller.set_mode("off")
    assert loop.controller.decide(load(50, 9.0, level=4)) == 0
    with pytest.raises(KeyError):
        loop.controller.set_mode("fast")


def test_a_verdict_on_the_slos_does_not_outlive_the_mode_that_it_was_made_in() -> None:
    loop = make_loop(costs=make_costs(deep=1.5, wide=1.5), gain_blocks=0)
    loop.run(compute(3.0, 15), 15.0)
    assert not loop.controller.slo_feasible
    loop.controller.set_mode("off")
    loop.controller.decide(load(50, 9.0, level=0))
    assert loop.controller.slo_feasible, "nobody has asked"


def test_without_the_outer_queue_the_engines_own_line_still_brings_it_down() -> None:
    line = 8
    waiting = Waiting(
        np.full(line, 160), np.zeros(line, dtype=np.int64), np.full(line, 10), np.full(line, 96.0), np.full(line, 1.0),
        np.zeros(line, dtype=np.bool_), np.zeros(line, dtype=np.int64),
    )  # fmt: skip
    costs = make_costs()
    subject = Controller(MorphSettings(), costs.max_level, costs, 512)
    reading = dataclasses.replace(load(0, 6.0, count=12, used=198), outer=None, waiting=waiting, head_fits=False)
    assert max(subject.decide(dataclasses.replace(reading, now_s=0.1 * tick)) for tick in range(8)) > 0


def test_a_decision_tells_what_was_forecast_of_the_levels_that_mattered() -> None:
    loop = make_loop()
    loop.run(kv(1.8, 10), 10.0)
    down = next(d for d in loop.controller.take_decisions() if d.action == "down")
    considered = {level.level: level for level in down.considered}
    assert {down.level_from, down.level_to} <= considered.keys()
    assert considered[down.level_to].score < considered[down.level_from].score
    assert down.inputs["pending"] >= 0 and loop.controller.counts[f"down/{down.reason}"] > 0


def test_a_model_of_few_levels_and_one_whose_step_is_a_single_token_are_served() -> None:
    costs = make_costs(ladder=("w8", "w4"))
    small = Controller(MorphSettings(), costs.max_level, costs, 1)
    reading = dataclasses.replace(load(3, 1.0), capacities=np.full(33, 200), max_batched_tokens=1)
    assert 0 <= small.decide(reading) <= 32


def test_the_closed_loop_runs_what_it_is_told() -> None:
    loop: ClosedLoop = make_loop()
    loop.fixed = 0
    jobs = kv(0.5, 5)
    out = loop.run(jobs, 30.0)
    assert all(j.made >= j.output for j in out.jobs) and out.preemptions == 0
