"""What the controller is told is true also before anything has ended, and however requests end."""

from __future__ import annotations

import numpy as np
import pytest

from morph_runtime.config import CacheSettings, SchedulerSettings
from morph_runtime.engine.messages import QueueSignal, SamplingParams
from morph_runtime.kv import BlockPool
from morph_runtime.morph.capacity_rule import expected_wait_s
from morph_runtime.morph.estimates import OuterQueue, OutputLengths
from morph_runtime.morph.load import Load
from morph_runtime.morph.signals import LoadReader
from morph_runtime.scheduler import PrefixCache, Request, Scheduler

BLOCK_TOKENS = 4


def busy_scheduler() -> Scheduler:
    """Two long requests run, one waits for their blocks."""
    pool = BlockPool(12)
    cache = PrefixCache(CacheSettings(prefix=False), pool, BLOCK_TOKENS)
    scheduler = Scheduler(SchedulerSettings(64, 512), pool, cache, BLOCK_TOKENS, 48, [])
    for key in range(3):
        scheduler.add(Request(key, [1] * 20, 20, SamplingParams(max_tokens=20, ignore_eos=True), arrival_s=float(key)))
    for _ in range(3):
        plan = scheduler.schedule(0)
        for request in plan.started:
            request.started_s = 10.0
        scheduler.advance(plan)
        scheduler.resolve(plan, [1 for part in plan.slices if part.samples], 0)
    return scheduler


def make_reader() -> LoadReader:
    return LoadReader((12, 24), 8, 512, BLOCK_TOKENS)


def read(reader: LoadReader, scheduler: Scheduler, now_s: float) -> Load:
    return reader.read(now_s, 0, 12, scheduler, None, 2.0)


def test_before_anything_has_ended_the_age_of_what_runs_stands_for_the_residence() -> None:
    load = read(make_reader(), busy_scheduler(), now_s=15.0)
    assert len(load.waiting) > 0
    assert load.typical.residence_s == 5.0
    assert expected_wait_s(load, 0) > expected_wait_s(load, 1)


def test_a_request_that_was_ended_from_outside_counts_with_its_own_length() -> None:
    scheduler = busy_scheduler()
    reader = make_reader()
    before = read(reader, scheduler, 13.0).running
    assert (before.context + before.uncomputed + before.output == 40).all()
    ended = scheduler.cancel(0)
    assert ended is not None and ended.output_len > 0
    reader.finished(ended, now_s=13.0)
    after = read(reader, scheduler, 13.0).running
    assert (after.context + after.uncomputed + after.output < 30).all()


def test_a_stale_or_missing_queue_signal_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    reader, scheduler = make_reader(), busy_scheduler()
    signal = QueueSignal(taken_s=10.0, pending=5)
    fresh = reader.read(11.0, 0, 12, scheduler, signal, 2.0)
    assert fresh.outer is not None and fresh.pending == 5 and reader.signals["queue"]
    for now_s in (13.0, 14.0, 15.0):
        assert reader.read(now_s, 0, 12, scheduler, signal, 2.0).outer is None
    assert not reader.signals["queue"]
    assert len([r for r in caplog.records if "older than 2 s" in r.message]) == 1
    assert reader.read(16.0, 0, 12, scheduler, QueueSignal(taken_s=16.0, pending=1), 2.0).pending == 1


def test_the_age_of_the_outer_queues_oldest_follows_from_what_came_and_what_waits() -> None:
    queue = OuterQueue()
    queue.take(QueueSignal(taken_s=0.0, pending=0))
    for second in range(1, 11):  # ten a second come, none leaves
        queue.take(QueueSignal(taken_s=float(second), pending=10 * second, arrivals_per_s=10.0))
    assert queue.state(10.0).oldest_s == pytest.approx(9.0, abs=1.0)
    queue.take(QueueSignal(taken_s=11.0, pending=20, arrivals_per_s=0.0, queue_time_s=9.0))
    assert queue.state(11.0).oldest_s == pytest.approx(2.0, abs=1.0), "the last twenty came from second 8 on"
    assert queue.age_error.seen
    assert queue.rate.fast < queue.rate.slow + 10


def test_what_is_left_of_an_output_is_learnt_from_longer_ones_and_bounded_by_its_limit() -> None:
    lengths = OutputLengths()
    most = np.array([1000, 1000, 1000, 3])
    assert lengths.left(np.zeros(4, dtype=np.int64), most).tolist() == [200, 200, 200, 3]
    for output in (10, 20, 300):
        lengths.add(output)
    assert lengths.left(np.array([0, 15, 290, 15]), most).tolist() == [110, 145, 10, 3]
    assert lengths.left(np.array([400]), np.array([1000]))[0] >= 1


def test_lengths_of_queued_requests_are_compared_with_the_truth() -> None:
    reader = make_reader()
    for key, length in enumerate((100, 100, 50)):
        reader.submitted(Request(key, [1] * length, length, SamplingParams(max_tokens=5)))
    assert 0 < reader.errors["prompt"] < 1 and "output" not in reader.errors
