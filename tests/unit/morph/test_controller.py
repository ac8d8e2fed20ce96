"""Without a cost model the controller acts when KV blocks are what requests wait for, and on nothing else; it never
flaps. With one: `test_prediction.py`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_runtime.config import MorphSettings
from morph_runtime.morph.controller import Controller
from morph_runtime.morph.load import Load, Outer, Running, Typical, Waiting

LEVELS = 12
CAPACITIES = tuple(100 + 12 * k for k in range(LEVELS + 1))
BLOCK = 16


def running(count: int) -> Running:
    """Requests that decode; their blocks are in `used`, and they are about to end."""
    zeros = np.zeros(count, dtype=np.int64)
    return Running(zeros, zeros, np.zeros(count), zeros, np.zeros(count), np.ones(count, dtype=np.bool_), zeros)


def waiting(count: int) -> Waiting:
    """Requests of 16 blocks each, the last one of them for their output."""
    zeros = np.zeros(count, dtype=np.int64)
    return Waiting(
        np.full(count, 15 * BLOCK), zeros, np.full(count, 15), np.full(count, 16.0), np.zeros(count),
        np.zeros(count, dtype=np.bool_), zeros,
    )  # fmt: skip


QUIET = Load(
    now_s=0.0, level=0, capacities=np.array(CAPACITIES), used=20, head_fits=True, block_tokens=BLOCK, max_running=64,
    max_batched_tokens=512, running=running(2), outer=Outer(0), typical=Typical(240, 0, 16, 16, residence_s=2.0),
)  # fmt: skip


def controller(mode: str = "balanced", dwell_s: float = 2.0) -> Controller:
    return Controller(MorphSettings(mode=mode, dwell_s=dwell_s, ttft_slo_s=2.0), LEVELS)


def burst(now_s: float, level: int, pending: int = 8) -> Load:
    capacity = CAPACITIES[level]
    return dataclasses.replace(
        QUIET, now_s=now_s, level=level, used=capacity - 4, running=running(6), waiting=waiting(2), head_fits=False,
        outer=Outer(pending),
    )  # fmt: skip


def drive(subject: Controller, make: object, start_s: float, seconds: float, level: int) -> list[int]:
    """Levels over time when each decision is carried out at once; one decision per 50 ms."""
    levels = []
    for tick in range(round(seconds / 0.05)):
        level = subject.decide(make(start_s + tick * 0.05, level))  # type: ignore[operator]
        levels.append(level)
    return levels


def quiet(now_s: float, level: int) -> Load:
    return dataclasses.replace(QUIET, now_s=now_s, level=level)


def test_a_burst_that_waits_for_blocks_goes_down_and_its_end_brings_full_precision_back() -> None:
    subject = controller()
    down = drive(subject, burst, 0.0, 2.0, 0)
    assert max(down) > 0
    up = drive(subject, quiet, 2.0, 4.0, down[-1])
    assert up[-1] == 0
    changes = [b - a for a, b in zip(down + up, (down + up)[1:], strict=False) if a != b]
    assert sum(1 for c in changes if c < 0) == 1


def test_it_does_not_act_on_a_spike_shorter_than_the_persistence_time() -> None:
    assert max(drive(controller("accuracy"), burst, 0.0, 0.9, 0)) == 0


def test_it_holds_when_sequences_not_blocks_are_what_requests_wait_for() -> None:
    def full_batch(now_s: float, level: int) -> Load:
        return dataclasses.replace(burst(now_s, level), running=running(64))

    assert max(drive(controller("performance"), full_batch, 0.0, 5.0, 0)) == 0


def test_it_holds_when_a_queue_waits_though_blocks_are_free() -> None:
    def compute_bound(now_s: float, level: int) -> Load:
        return dataclasses.replace(QUIET, now_s=now_s, level=level, used=60, outer=Outer(30), waiting=waiting(2))

    assert max(drive(controller("performance"), compute_bound, 0.0, 5.0, 0)) == 0


def test_it_takes_the_least_level_that_meets_the_target() -> None:
    subject = controller()
    drive(subject, lambda t, _: burst(t, 0, pending=2), 0.0, 0.3, 0)
    level = subject.decide(burst(0.35, 0, pending=2))
    assert 0 < level < LEVELS


@pytest.mark.parametrize(("mode", "deepest"), [("off", 0), ("accuracy", 6), ("balanced", 12), ("performance", 12)])
def test_each_mode_keeps_its_cap(mode: str, deepest: int) -> None:
    def endless(now_s: float, level: int) -> Load:
        return burst(now_s, level, pending=200)

    assert max(drive(controller(mode), endless, 0.0, 5.0, 0)) == deepest


def test_a_mode_with_a_lower_cap_takes_levels_back_at_once() -> None:
    subject = controller("performance")
    level = drive(subject, burst, 0.0, 2.0, 0)[-1]
    subject.set_mode("off")
    assert subject.decide(burst(2.0, level)) == 0
    with pytest.raises(KeyError):
        subject.set_mode("fast")


@given(
    st.lists(st.integers(0, 3), min_size=400, max_size=400), st.sampled_from(["accuracy", "balanced", "performance"])
)
@settings(max_examples=25, deadline=None)
def test_a_load_that_flickers_around_the_capacity_reverses_at_most_once_per_dwell(
    pending: list[int], mode: str
) -> None:
    subject = controller(mode)
    level, changes = 0, []
    for tick, count in enumerate(pending):
        now = tick * 0.05
        fits = CAPACITIES[level] - 80 > 20 * count
        reading = (
            burst(now, level, count)
            if not fits
            else dataclasses.replace(quiet(now, level), used=60, outer=Outer(count))
        )
        chosen = subject.decide(reading)
        if chosen != level:
            changes.append((now, 1 if chosen > level else -1))
        level = chosen
    ups = [now for now, direction in changes if direction < 0]
    downs = [now for now, direction in changes if direction > 0]
    for up in ups:
        assert all(up - down >= 2.0 - 1e-9 for down in downs if down < up)


def test_decisions_are_logged_with_inputs_and_reason_and_counted() -> None:
    subject = controller()
    drive(subject, burst, 0.0, 1.0, 0)
    decisions = subject.take_decisions()
    down = next(d for d in decisions if d.action == "down")
    assert down.reason == "kv_wait"
    assert down.inputs["waiting"] == 2
    assert subject.counts["down/kv_wait"] >= 1
    assert subject.take_decisions() == []
