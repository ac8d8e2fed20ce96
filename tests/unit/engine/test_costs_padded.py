"""Costs of a device that pads its steps and runs beside the host, noise and outliers included."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.conftest import EngineFactory, make_model
from engine.padding_device import Noise, PaddingDevice, own_time
from morph_runtime.costs.held_out import check_held_out
from morph_runtime.costs.measure import measure
from morph_runtime.costs.probe import Shape, StepProbe
from morph_runtime.costs.timing import doubtful, supported, time_shapes
from morph_runtime.engine.core import EngineParts
from morph_runtime.models.batch import HostBatch
from morph_runtime.morph.costs import StepCosts
from morph_runtime.morph.levels import LevelPlan

PLAN = LevelPlan(range(4), ("w8", "w4"))
SIZES = (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)
MIXED_SIZES = (128, 256, 512, 768, 1280, 2048)
Devices = Callable[..., tuple[EngineParts, PaddingDevice]]


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of long contexts."""
    return make_model(tmp_path_factory.mktemp("long"), kv_heads=2, positions=4096)


@pytest.fixture(autouse=True)
def machine_does_not_matter() -> Iterator[None]:
    """No time but the device's counts."""
    with own_time():
        yield


@pytest.fixture
def devices(engines: EngineFactory, long_model: Path) -> Devices:
    """Makes engines of which steps run on a device of the given noise."""

    def make(noise: Noise, launch_s: float = 5e-4) -> tuple[EngineParts, PaddingDevice]:
        engine = engines(
            long_model, overlap="on", morph={"ladder": ["w8", "w4"]}, memory={"kv_tokens": 24576, "block_tokens": 16},
            scheduler={"max_num_seqs": 64, "max_num_batched_tokens": 2048},
        )  # fmt: skip
        device = PaddingDevice(lambda: engine.parts.swapper.rungs, SIZES, MIXED_SIZES, noise, launch_s)
        return replace(engine.parts, runner=device), device

    return make


def quiet(seed: int = 0) -> Noise:
    return Noise(np.random.default_rng(seed))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_held_out_steps_are_within_a_tenth_under_noise_and_outliers(devices: Devices, seed: int) -> None:
    noise = Noise(np.random.default_rng(seed), jitter=0.01, slow=0.01, late=0.01)
    parts, device = devices(noise)
    measured = measure(parts, PLAN, 5.0, device.clock)
    assert device.now_s < 1.3 * 5.0  # a rung's steps may begin when its time is about to end
    assert measured.costs.step_sizes == SIZES and not measured.unreached
    rows = check_held_out(parts, PLAN, measured.costs, 20.0, device.clock)
    assert {row.level for row in rows} == {0, 2, 4, 6, 8}
    assert sum(row.shape.prefill > 0 for row in rows) >= 5 * 6
    worst = max(rows, key=lambda row: abs(row.error))
    assert abs(worst.error) < 0.1, worst
    assert np.median([abs(row.error) for row in rows]) < 0.03


def test_steps_of_prompts_cost_what_the_size_costs_to_which_they_are_padded(devices: Devices) -> None:
    parts, device = devices(quiet())
    costs = measure(parts, PLAN, 5.0, device.clock).costs
    at = [costs.seconds(4, 0, 0, n, 0) for n in (129, 200, 256, 257)]
    assert at[0] == at[1] == at[2] < at[3]
    again = StepCosts.from_json(json.loads(json.dumps(costs.to_json())), PLAN)
    assert again.to_json() == costs.to_json() and again.step_sizes == SIZES


def test_a_slow_spell_of_the_host_that_meets_every_round_of_a_step_is_found_by_what_it_contradicts(
    devices: Devices,
) -> None:
    parts, device = devices(quiet())
    seen: list[int] = []

    def slow_at_first(batch: HostBatch) -> float:  # the first ten steps of 2,048 tokens at the deepest level
        if set(parts.swapper.rungs) != {"w4"} or batch.num_tokens != 2048 or len(seen) == 10:
            return 0.0
        seen.append(batch.num_tokens)
        return 0.03

    device.extra_s = slow_at_first
    costs = measure(parts, PLAN, 20.0, device.clock).costs
    assert len(seen) == 10
    device.extra_s = lambda _: 0.0
    wanted = (2.7e-3**4 + (2048 * 24e-6) ** 4) ** 0.25
    assert costs.seconds(8, 0, 0, 2048, 0) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(("launch_s", "wanted"), [(1e-3, 5.2e-3), (8e-3, 8e-3)])
def test_a_step_takes_the_longer_of_host_and_device_not_both(devices: Devices, launch_s: float, wanted: float) -> None:
    parts, device = devices(quiet(), launch_s=launch_s)
    probe = StepProbe(parts, device.clock)
    with probe.borrow_blocks():
        for steps in (1, 4):
            assert probe.run(Shape(1, 128), steps) == pytest.approx(wanted, rel=0.02)


def test_a_prompt_longer_than_a_request_may_be_is_extrapolated(devices: Devices) -> None:
    parts, device = devices(quiet())
    short = replace(parts, max_model_len=1000)
    costs = measure(short, PLAN, 5.0, device.clock).costs
    whole = measure(parts, PLAN, 5.0, device.clock).costs
    assert costs.step_sizes == SIZES
    assert costs.seconds(0, 0, 0, 2048, 0) == pytest.approx(whole.seconds(0, 0, 0, 2048, 0), rel=0.1)


def test_an_engine_too_slow_to_time_prompts_still_gets_a_model(devices: Devices) -> None:
    parts, device = devices(quiet())
    device.extra_s = lambda _: 1.0
    costs = measure(parts, PLAN, 0.5, device.clock).costs
    assert costs.step_sizes == () and costs.seconds(0, 0, 0, 2048, 0) > 1.0


def test_what_is_timed_stays_within_the_budget_and_agreeing_samples_end_it_early(devices: Devices) -> None:
    parts, device = devices(quiet())
    probe = StepProbe(parts, device.clock)
    shapes = [Shape(8, 128), Shape(0, prefill=2048)]
    with probe.borrow_blocks():
        time_shapes(probe, shapes, 60.0, 0)
    # Two to warm up, then two samples a shape, each of the steps that are timed and one before them.
    assert device.launches == 2 + 2 * (3 + 1) + 2 * (1 + 1)


def test_the_least_two_samples_that_support_each_other_count() -> None:
    assert supported([70.0, 50.0, 50.5]) == 50.25
    assert supported([50.0, 20.0, 70.0, 50.5]) == 50.25  # 20: the host was late in seeing the first step's end
    assert supported([50.0, 60.0, 70.0]) == 60.0
    assert supported([70.0]) == 70.0


def test_times_that_contradict_each_other_are_doubted() -> None:
    fine = {Shape(0, prefill=n): t for n, t in ((512, 17.0), (1024, 25.0), (1536, 40.0), (2048, 50.0))}
    assert doubtful(fine) == []
    assert doubtful({**fine, Shape(0, prefill=2048): 70.7}) == [Shape(0, prefill=1536), Shape(0, prefill=2048)]
    assert doubtful({**fine, Shape(0, prefill=1024): 45.0}) == [
        Shape(0, prefill=512), Shape(0, prefill=1024), Shape(0, prefill=1536),
    ]  # fmt: skip
    stairs = {Shape(n, 128): t for n, t in ((1, 3.0), (64, 4.4), (65, 5.7), (128, 5.7))}
    assert doubtful({**fine, **stairs, Shape(16, 128, 64): 1.0}) == []
