"""Online correction: predictions follow what steps really take, and a stray step moves them little."""

from __future__ import annotations

import random

import numpy as np
import pytest

from morph.test_cost_model import COSTS
from morph_runtime.costs.correction import StepCorrection
from morph_runtime.models.batch import HostBatch
from morph_runtime.morph.costs import pairs_of

NOTHING = np.zeros(0, dtype=np.int64)


def batch_of(lengths: list[int], contexts: list[int]) -> HostBatch:
    tokens = np.zeros(sum(lengths), dtype=np.int64)
    sizes, ends = np.array(lengths, dtype=np.int32), np.array(contexts, dtype=np.int32)
    return HostBatch(tokens, tokens, tokens, sizes, ends, NOTHING.astype(np.int32), ends, NOTHING)


def test_the_ratio_converges_to_what_steps_take_whatever_their_size() -> None:
    correction, rng = StepCorrection(COSTS), random.Random(0)
    assert correction.ratio(0) == 1
    for _ in range(300):
        predicted = rng.uniform(1e-3, 0.1)
        correction.observe(0, predicted, 1.5 * predicted * rng.uniform(0.9, 1.1))
    assert correction.ratio(0) == pytest.approx(1.5, rel=0.05)
    assert float(correction.step_s(0, 8, 0, 0, 0)) == pytest.approx(1.5 * 9e-3, rel=0.05)


def test_a_step_a_thousand_times_as_long_moves_it_by_a_few_percent() -> None:
    correction = StepCorrection(COSTS)
    for _ in range(100):
        correction.observe(0, 0.01, 0.01)
    correction.observe(0, 0.01, 10.0)
    correction.observe(0, 0.01, 0.0)  # a clock that stood still tells nothing
    assert 1 < correction.ratio(0) < 1.05


def test_mixes_of_rungs_are_corrected_apart_and_an_unseen_one_has_the_ratio_of_all() -> None:
    correction = StepCorrection(COSTS)
    for _ in range(300):
        correction.observe(0, 0.01, 0.02)
    assert correction.ratio(4) == pytest.approx(2, rel=0.05)
    for _ in range(300):
        correction.observe(4, 0.01, 0.01)
    assert correction.ratio(4) == pytest.approx(1, rel=0.05)
    assert correction.ratio(0) == pytest.approx(2, rel=0.05)


def test_a_batch_is_predicted_by_its_decodes_and_chunks() -> None:
    correction = StepCorrection(COSTS)
    assert correction.predict(3, batch_of([1, 1, 1], [10, 20, 30])) == COSTS.seconds(3, 3, 60, 0, 0)
    mixed = batch_of([1, 40, 1, 7], [100, 140, 50, 7])
    pairs = pairs_of(100, 40) + pairs_of(0, 7)
    assert correction.predict(8, mixed) == pytest.approx(COSTS.seconds(8, 2, 150, 47, pairs))
