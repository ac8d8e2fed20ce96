"""What the controller is told is true also before anything has ended, and however requests end."""

from __future__ import annotations

from morph_runtime.config import CacheSettings, SchedulerSettings
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.kv import BlockPool
from morph_runtime.morph.capacity_rule import expected_wait_s
from morph_runtime.morph.load import Load
from morph_runtime.morph.signals import LoadReader
from morph_runtime.scheduler import PrefixCache, Request, Scheduler

BLOCK_TOKENS = 4


def busy_scheduler() -> Scheduler:
    """Two long requests run, one waits for their blocks."""
    pool = BlockPool(12)
    cache = PrefixCache(CacheSettings(prefix=False), pool, BLOCK_TOKENS)
    scheduler = Scheduler(SchedulerSettings(), pool, cache, BLOCK_TOKENS, 48, [])
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
