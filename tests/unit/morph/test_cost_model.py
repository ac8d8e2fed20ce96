"""The cost model: what it predicts, what it becomes in JSON, and that a fit finds it again under noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from morph_runtime.costs.fit import fit_steps, non_negative
from morph_runtime.costs.probe import Shape
from morph_runtime.morph.costs import StepCosts, layer_counts
from morph_runtime.morph.levels import LevelPlan

PLAN = LevelPlan(range(4), ("w8", "w4"))
COSTS = StepCosts(
    rungs=("full", "w8", "w4"),
    tokens=np.array([1.0, 8.0, 32.0, 128.0]),
    whole_s=np.array([[8.0, 9.0, 14.0, 40.0], [6.0, 7.5, 13.0, 41.0], [3.0, 6.0, 15.0, 48.0]]) * 1e-3,
    context_s=1e-6,
    pair_s=2e-7,
    counts=layer_counts(PLAN),
    down_s=0.01,
    up_s=0.02,
    mean_context_s=8e-7,
    chunk_s=5e-7,
    prompt_s=np.array([-1e-3, -5e-4, -2e-4, 0.0]),
    row_s=4e-5,
    mixed_s=1e-4,
    downs_s=(0.01, 0.03),
    ups_s=(0.02, 0.04),
    depth=2,
)
PADDED = replace(
    COSTS,
    step_sizes=(16, 64, 128),
    mixed_sizes=(64, 128),
    padded_s=np.array([[9.0, 22.0, 41.0], [8.0, 21.0, 40.0], [7.0, 25.0, 50.0]]) * 1e-3,
)
DECODES = [Shape(n, 16) for n in (1, 8, 32)]
CHUNKS = [Shape(0, prefill=n) for n in (128,)]
OTHERS = [
    Shape(32, 256), Shape(1, 2048), Shape(1, 1024), Shape(8, 1024), Shape(0, prefill=128, start=1900),
    Shape(0, prefill=32, start=2000), Shape(0, prefill=32, start=1000), Shape(0, prefill=8), Shape(0, prefill=32),
    Shape(16, 16, prefill=100), Shape(16, 16, prefill=40),
]  # fmt: skip


@pytest.mark.parametrize("costs", [COSTS, PADDED], ids=["as they are", "padded"])
@pytest.mark.parametrize("level", [0, 2, 4, 7, 8])
@pytest.mark.parametrize(
    "step",
    [(1, 500, 0, 0), (32, 9000, 0, 0), (5, 700, 100, 9000), (0, 0, 64, 3000), (3, 60, 61, 900), (0, 0, 300, 60000)],
)
def test_the_quick_path_says_what_the_broadcasting_one_says(
    costs: StepCosts, level: int, step: tuple[int, int, int, int]
) -> None:
    assert costs.seconds(level, *step) == pytest.approx(float(costs.step_s(level, *step)), rel=1e-12)


def test_a_step_with_prompt_tokens_costs_what_the_size_costs_to_which_it_is_padded() -> None:
    assert PADDED.seconds(0, 0, 0, 16, 0) == pytest.approx(9e-3)
    assert PADDED.seconds(0, 0, 0, 17, 0) == PADDED.seconds(0, 0, 0, 64, 0) == pytest.approx(22e-3)
    assert PADDED.seconds(0, 14, 0, 50, 0) == pytest.approx(22e-3 + 14 * 4e-5)  # 64 tokens with the decodes
    assert PADDED.seconds(0, 15, 0, 50, 0) == pytest.approx(41e-3 + 15 * 4e-5)
    for count in (9, 64):  # between rungs there are fewer sizes, and the mixture's surcharge
        assert PADDED.seconds(2, 0, 0, count, 0) == pytest.approx(21.5e-3 + 1e-4)
    assert PADDED.seconds(0, 0, 0, 256, 0) == pytest.approx(2 * 41e-3)  # no step of an engine: a plan of a larger one
    for level in (0, 3, 8):  # decodes alone are not padded with it
        assert PADDED.seconds(level, 20, 900, 0, 0) == COSTS.seconds(level, 20, 900, 0, 0)
    times = PADDED.fixed_s(np.arange(9)[:, None], 0, np.arange(1, 129))
    assert times.shape == (9, 128) and (times[8, 16:64] == times[8, 63]).all()


def test_arguments_broadcast_over_levels_and_loads() -> None:
    times = COSTS.step_s(np.arange(9)[:, None], np.array([1, 8, 32]), 0, 0, 0)
    assert times.shape == (9, 3)
    assert times[8, 1] == pytest.approx(6e-3)
    assert times[2, 0] == pytest.approx((8e-3 + 6e-3) / 2 + 1e-4)  # half of the layers, and the mixture's surcharge


def test_a_shift_costs_each_layer_at_its_rung_and_no_less_than_the_steps_between_which_layers_change() -> None:
    assert COSTS.shift_s(0, 6) == pytest.approx(4 * 0.01 + 2 * 0.03)
    assert COSTS.shift_s(8, 3) == pytest.approx(4 * 0.04 + 1 * 0.02)
    assert COSTS.shift_s(3, 3) == 0
    assert COSTS.shift_s(0, 4, step_s=0.1) == pytest.approx(4 * 0.1 / 2)


def test_json_gives_the_model_back_and_a_file_without_the_newer_fields_is_read() -> None:
    padded = PADDED.to_json()
    assert StepCosts.from_json(padded, PLAN).to_json() == padded
    values = COSTS.to_json()
    assert StepCosts.from_json(values, PLAN).to_json() == values
    old = {name: values[name] for name in ("rungs", "tokens", "whole_s", "context_s", "pair_s", "down_s", "up_s")}
    costs = StepCosts.from_json(old, PLAN)
    assert float(costs.step_s(0, 8, 100, 0, 0)) == pytest.approx(9e-3 + 1e-4)
    assert costs.shift_s(0, 6) == pytest.approx(0.06)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [1, 8, 8, 128]},
        {"whole_s": [[1, 2]]},
        {"context_s": -1.0},
        {"pair_s": float("nan")},
        {"depth": 0},
        {"downs_s": [1.0]},
        {"prompt_s": [0.0]},
        {"rungs": ["full", "w4"]},
        {"up_s": "fast"},
        {"step_sizes": [16, 16]},
        {"mixed_sizes": [16]},
        {"step_sizes": [8, 16], "padded_s": [[1.0, 2.0]] * 3, "mixed_sizes": [8]},
        {"step_sizes": [8, 16], "padded_s": [[1.0, 2.0]] * 3, "mixed_sizes": [9, 16]},
        {"step_sizes": [0, 16]},
        {"step_sizes": [16], "padded_s": [[1.0], [1.0]]},
        {"step_sizes": [16], "padded_s": [[1.0], [1.0], [0.0]]},
    ],
)
def test_a_damaged_model_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        StepCosts.from_json({**COSTS.to_json(), **change}, PLAN)


@pytest.mark.parametrize(("noise", "bar"), [(0.0, 0.01), (0.03, 0.08)])
def test_a_fit_finds_a_known_model_again_under_noise(noise: float, bar: float) -> None:
    rng = np.random.default_rng(3)

    def timed(shapes: list[Shape], level: int) -> dict[Shape, float]:  # disturbances only ever add
        return {s: s.predicted_s(COSTS, level) * (1 + noise * rng.random()) for s in shapes}

    fit = fit_steps([timed(DECODES + CHUNKS, level) for level in (0, 4, 8)], timed(OTHERS, 0))
    found = replace(
        COSTS, tokens=fit.tokens, whole_s=fit.whole_s, context_s=fit.context_s, mean_context_s=fit.mean_context_s,
        pair_s=fit.pair_s, chunk_s=fit.chunk_s, prompt_s=fit.prompt_s, row_s=fit.row_s,
    )  # fmt: skip
    found.check()
    others = [Shape(4, 300), Shape(20, 100), Shape(0, prefill=60, start=500), Shape(10, 200, prefill=90, start=300)]
    for level in (0, 2, 4, 6, 8):
        for shape in [*DECODES, *CHUNKS, *others]:
            assert shape.predicted_s(found, level) == pytest.approx(shape.predicted_s(COSTS, level), rel=bar)


def test_padded_steps_that_were_not_timed_lie_on_a_line_between_those_that_were() -> None:
    decodes = {Shape(1, 16): 1.0, Shape(8, 16): 1.1}
    chunks = [Shape(0, prefill=n) for n in (16, 64, 100)]
    full = {**decodes, **dict(zip(chunks, (2.0, 5.0, 9.0), strict=True))}
    half = {shape: seconds / 2 for shape, seconds in full.items() if shape != chunks[1]}
    fit = fit_steps([full, half], {}, (16, 32, 64, 128, 256))
    assert fit.tokens.tolist() == [1, 8]  # of decodes alone
    assert fit.step_sizes == (16, 32, 64, 128, 256) and fit.padded_s is not None
    assert fit.padded_s[0].tolist() == pytest.approx([2.0, 3.0, 5.0, 9.0, 17.0])
    assert fit.padded_s[1].tolist() == pytest.approx([1.0, 1.5, 2.5, 4.5, 8.5])
    without = fit_steps([decodes], {}, (16, 32))
    assert without.padded_s is None and without.step_sizes == ()


def test_a_device_too_slow_for_more_than_two_steps_still_gets_a_model() -> None:
    few = [Shape(1, 16), Shape(64, 16)]
    fit = fit_steps([{few[0]: 1.0, few[1]: 1.5}, {few[0]: 0.8}], {})
    assert fit.tokens.tolist() == [1, 64]
    assert fit.whole_s[1].tolist() == pytest.approx([0.8, 1.2])  # the ratio of the neighbour
    assert fit_steps([{few[0]: 1.0}], {}).whole_s.shape == (1, 2)


def test_a_coefficient_that_noise_makes_negative_is_nothing() -> None:
    features = np.array([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    assert non_negative(features, np.array([1.0, 2.2, 4.4]), np.ones(3))[1] == 0
    assert non_negative(features, np.array([-1.0, -1.0, -1.0]), np.ones(3)).tolist() == [0, 0]
