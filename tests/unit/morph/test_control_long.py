"""The controller over minutes: streams that a preemption stops, and loads so light that full precision serves them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from morph.closed_loop import Job, Outcome, make_costs, make_loop, steady
from morph.test_prediction import load
from morph_runtime.morph.forecast import Forecaster, Futures
from morph_runtime.morph.load import Load, Running, Typical, Waiting
from morph_runtime.slo import SloClass


def long_generations() -> list[Job]:
    """As many as fit when they begin, and twice as much as fits when they end; nothing comes after them."""
    return [Job(0.1 * n, 32, 2400) for n in range(14)]


def run_long(**rest: float) -> Outcome:
    return make_loop(base=1200, gain_blocks=72, costs=make_costs(scale=2.6), **rest).run(long_generations(), 150.0)


def test_a_stream_that_is_preempted_brings_the_level_down_and_goes_on() -> None:
    outcome, at_full = run_long(), run_long(fixed=0)
    stopped, stopped_at_full = (max(job.gap_s for job in o.jobs) for o in (outcome, at_full))
    assert stopped_at_full > 10, "full precision alone has not the blocks"
    assert stopped < 3, [job.gap_s for job in outcome.jobs]
    assert outcome.levels[-1][1] == 0, "and all comes back"


@pytest.mark.parametrize("alone_s, every_s", [(0.72, 20.0), (0.84, 8.0), (1.08, 20.0), (1.2, 8.0)])
def test_requests_one_at_a_time_are_served_at_full_precision_though_each_takes_long(
    alone_s: float, every_s: float
) -> None:
    prompt = 500
    costs = make_costs(scale=alone_s / make_costs().seconds(0, 0, 0, prompt, prompt * prompt // 2))
    trickle = [Job(every_s * n, prompt, 8) for n in range(1, int(600 / every_s))]
    burst = steady(4.0, 6.0, prompt, 8, start_s=50.0)
    outcome = make_loop(costs=costs).run(sorted([*trickle, *burst], key=lambda job: job.arrival_s), 600.0)
    assert outcome.deepest > 0, "the burst takes it down"
    assert outcome.below_full(150.0) < 0.1


@pytest.mark.parametrize("prompt", [33.3, 499.97, 500.0, 512.0, 520.0, 1300.0])
def test_the_time_of_a_lone_request_is_that_of_its_steps(prompt: float) -> None:
    costs = make_costs()
    maker = Forecaster(costs, [SloClass("", 2.0)], 512)
    one, no = np.ones(1), np.zeros(1, dtype=np.bool_)
    idle = Load(
        now_s=0.0, level=0, capacities=np.full(17, 500), used=0, head_fits=True, block_tokens=16, max_running=64,
        max_batched_tokens=512, typical=Typical(prompt, 0, 32, 40, 1.0), arrivals_per_s=0.01, mean_arrivals_per_s=0.01,
    )  # fmt: skip
    told = maker.forecast(idle, Futures(np.zeros(1, dtype=np.int64), one, no, one, one)).ttft_s[0]
    whole, rest = divmod(round(prompt), 512)
    steps = [512] * whole + [rest] * (rest > 0)
    done = np.concatenate([[0], np.cumsum(steps)])
    true = sum(costs.seconds(0, 0, 0, n, int(n * (before + n / 2))) for n, before in zip(steps, done[:-1], strict=True))
    assert told == pytest.approx(true, rel=0.05)


def test_an_up_shift_leaves_room_for_what_the_running_requests_will_take() -> None:
    """They fit level 0 now, and will not."""
    few = {"context": np.full(8, 320), "uncomputed": np.ones(8, dtype=np.int64), "blocks": np.full(8, 20)}
    rest = {"age_s": np.zeros(8), "begun": np.ones(8, dtype=np.bool_), "slo": np.zeros(8, dtype=np.int64)}
    growing = Running(**few, output=np.full(8, 400.0), **rest)
    ending = Running(**few, output=np.full(8, 10.0), **rest)
    base = load(pending=0, rate=0.01)
    assert dataclasses.replace(base, running=growing, used=160).peak == pytest.approx(160 + 8 * 400 / 16)
    assert dataclasses.replace(base, running=ending, used=160).peak == pytest.approx(160 + 8 * 10 / 16)
    stalled = Waiting(
        tokens=np.array([640]), cached=np.zeros(1, dtype=np.int64), blocks=np.array([40]), output=np.array([32.0]),
        age_s=np.ones(1), begun=np.ones(1, dtype=np.bool_), slo=np.zeros(1, dtype=np.int64),
    )  # fmt: skip
    assert dataclasses.replace(base, running=ending, waiting=stalled, used=160).peak >= 160 + 40 + 9 * 10 / 16


def test_a_request_that_misses_its_target_by_itself_brings_the_level_down() -> None:
    """The bound grows to the mode's own and no further."""
    outcome = make_loop(costs=make_costs(scale=40.0)).run([Job(5.0 * n, 500, 4) for n in range(20)], 100.0)
    assert outcome.deepest > 0
