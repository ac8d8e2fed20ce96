"""TTFT and residence are booked once for each request that they can be known of, with steps in flight or without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine.conftest import run_all, submit
from engine.test_overlap import overlapped
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import SamplingParams, Submit
from morph_runtime.scheduler import Request

if TYPE_CHECKING:
    from engine.conftest import EngineFactory

PARAMS = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)


@pytest.fixture(params=["one by one", "overlap"])
def engine(request: pytest.FixtureRequest, tiny_model: Path, engines: EngineFactory) -> Engine:
    made = engines(tiny_model, memory={"kv_tokens": 160})
    return made if request.param == "one by one" else overlapped(made)[0]


def booked(engine: Engine, name: str) -> list[int]:
    """The keys of the requests that are given to the statistics' method `name`."""
    keys: list[int] = []
    method = getattr(engine.statistics, name)

    def note(request: Request, now_s: float) -> None:
        keys.append(request.key)
        method(request, now_s)

    setattr(engine.statistics, name, note)
    return keys


def test_each_request_has_one_first_token_whatever_runs_behind_it(engine: Engine) -> None:
    first = booked(engine, "first_token")
    for key in range(1, 9):
        submit(engine, key, [key] * (3 + 7 * key % 60), 30)
    run_all(engine)
    assert engine.parts.scheduler.preemptions > 0, "a preempted request must not begin anew"
    assert sorted(first) == list(range(1, 9))


def test_a_request_that_another_engine_began_has_no_first_token_here(engine: Engine) -> None:
    first = booked(engine, "first_token")
    engine.submit(Submit(key=1, prompt=[5] * 9, resumed=[7], sampling=PARAMS))
    submit(engine, 2, [5] * 9, 3)
    run_all(engine)
    assert first == [2]


def test_what_was_cancelled_before_it_started_here_has_no_residence(engine: Engine) -> None:
    ended = booked(engine, "finished")
    engine.submit(Submit(key=1, prompt=[5] * 9, resumed=[7] * 4, sampling=PARAMS))
    engine.cancel(1)
    engine.submit(Submit(key=2, prompt=[5] * 9, resumed=[7] * 4, sampling=PARAMS))
    for _ in range(3):
        engine.step(decide=False)
    engine.cancel(2)
    run_all(engine)
    assert ended == [2]
