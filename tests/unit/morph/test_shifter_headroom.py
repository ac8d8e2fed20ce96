"""A way up, even one that is forced on a full cache, takes no block that a running request is about to need."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.conftest import make_model, submit
from engine.test_overlap import overlapped
from morph.test_shifter_faults import small_engine
from morph.test_shifter_pipeline import queued_engine
from morph_runtime.engine.core import Engine
from morph_runtime.memory.moves import MoveLine, ThreadWorker

KINDS = ("one by one", "overlap", "queue", "queue and worker")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), kv_heads=2)


@pytest.fixture(scope="module")
def made(folder: Path) -> Iterator[dict[str, Engine]]:
    """One engine of each kind for all examples: each leaves it idle."""
    one = {"one by one": small_engine(folder), "overlap": overlapped(small_engine(folder))[0]}
    for kind in KINDS[2:]:
        one[kind], queue = queued_engine(folder)
        queue.passed = 1 << 60  # it is never late
    arena = one[KINDS[-1]].parts.arena
    arena._line = MoveLine(ThreadWorker("moves", lambda: None))
    yield one
    arena._line.close()
    for kind in KINDS:
        one[kind].parts.arena.close() if kind in KINDS[2:] else one[kind].close()


def finish(engine: Engine) -> None:
    """Run everything to its end, and go back to level 0."""
    engine.parts.shifter.target = 0
    while engine.has_requests or engine.parts.shifter.busy or engine.level:
        engine.parts.shifter.target = 0  # an idle engine is never refused
        engine.step(decide=False)
    assert engine.parts.pool.capacity == engine.parts.capacities[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_that_gives_blocks_up_preempts(made: dict[str, Engine], kind: str) -> None:
    engine, key, lowered = made[kind], 0, 0
    parts = engine.parts

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(
        start=st.integers(1, 8),
        sizes=st.lists(st.tuples(st.integers(40, 70), st.integers(4, 60)), min_size=3, max_size=6),
        since=st.integers(0, 20),
    )
    def run(start: int, sizes: list[tuple[int, int]], since: int) -> None:
        nonlocal key, lowered
        engine.set_level(start)
        for prompt, tokens in sizes:
            key += 1
            submit(engine, key, [1 + key % 190] * prompt, tokens)
        steps = 0
        while engine.has_requests:
            if steps >= since:
                parts.shifter.target = 0
            capacity, preemptions = parts.pool.capacity, parts.scheduler.preemptions
            engine.step(decide=False)
            steps += 1
            if parts.pool.capacity < capacity:
                lowered += 1
                assert parts.scheduler.preemptions == preemptions
        finish(engine)

    run()
    assert lowered > 0, "the test must give blocks up beside requests"


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_way_up_waits_for_room_says_so_once_and_goes_on(
    made: dict[str, Engine], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "morph_runtime.morph.shifter")
    engine = made[kind]
    parts, base = engine.parts, engine.parts.capacities[0]
    level = next(k for k, blocks in enumerate(parts.capacities) if blocks >= base + 12)
    engine.set_level(level)
    size = parts.config.memory.block_tokens
    prompt = base // 4 * size - 4
    for key in range(1, 5):
        submit(engine, -key, [key] * prompt, 6 * key)
    engine.step(decide=False)
    assert parts.pool.num_used == base and parts.scheduler.num_running == 4
    preemptions, beside = parts.scheduler.preemptions, 0
    while engine.has_requests:
        parts.shifter.target = 0  # as the controller says at each decision when a level is forbidden
        engine.step(decide=False)
        if parts.pool.capacity == base:
            beside = max(beside, parts.scheduler.num_running)
    assert parts.scheduler.preemptions == preemptions
    assert beside > 0, "it goes up as soon as there is room, not when all is over"
    refusals = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(refusals) == len({text.split(" for now")[0] for text in refusals}) >= 1
    finish(engine)
