"""Requests with the same prompt that one client asked for at once: the prompt is computed once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine.conftest import run_all, submit
from morph_runtime.engine.messages import SamplingParams, StructuredOutputs, Submit

if TYPE_CHECKING:
    from engine.conftest import EngineFactory
    from morph_runtime.engine.core import Engine

PROMPT = [*range(1, 101)]
"""12 blocks and a half: three steps of prefill."""


def submit_outputs(engine: Engine, n: int, first: int = 1, max_tokens: int = 6, **params: object) -> None:
    """`n` outputs of one request; output i draws with the seed 70 + i."""
    for at in range(n):
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=70 + at, **params)  # type: ignore[arg-type]
        engine.submit(Submit(key=first + at, prompt=PROMPT, sampling=sampling, after=first if at else 0))


def prefill_tokens(engine: Engine) -> list[int]:
    """Makes the engine note the tokens of each of its steps."""
    scheduler, schedule = engine.parts.scheduler, engine.parts.scheduler.schedule
    counts: list[int] = []

    def counted(level: int):  # type: ignore[no-untyped-def]
        plan = schedule(level)
        counts.append(sum(part.length for part in plan.slices if part.start + part.length <= len(PROMPT)))
        return plan

    scheduler.schedule = counted  # type: ignore[method-assign]
    return counts


def test_the_prompt_is_computed_once_for_all_outputs(tiny_model: Path, engines: EngineFactory) -> None:
    engine = engines(tiny_model)
    counts = prefill_tokens(engine)
    submit_outputs(engine, 5)
    out = run_all(engine)
    assert sorted(out) == [1, 2, 3, 4, 5] and {len(tokens) for tokens in out.values()} == {6}
    assert sum(counts) == 100 + 4 * 4  # the others compute what follows the last full block
    assert engine.stats().prefix_hits == 4 * 96


def test_each_output_is_what_a_request_with_its_seed_alone_gets(tiny_model: Path, engines: EngineFactory) -> None:
    engine = engines(tiny_model)
    submit_outputs(engine, 4)
    together = run_all(engine)
    assert len({tuple(tokens) for tokens in together.values()}) > 1
    alone = engines(tiny_model, cache={"prefix": False})
    for at in range(4):
        submit(alone, 11 + at, PROMPT, 6, temperature=1.0, seed=70 + at)
        assert run_all(alone)[11 + at] == together[1 + at]


def test_without_the_prefix_cache_each_computes_the_prompt_and_nobody_waits(
    tiny_model: Path, engines: EngineFactory
) -> None:
    engine = engines(tiny_model, cache={"prefix": False})
    counts = prefill_tokens(engine)
    submit_outputs(engine, 3)
    assert engine.parts.scheduler.num_waiting == 3
    run_all(engine)
    assert sum(counts) == 300


@pytest.mark.parametrize("steps", [0, 1])
def test_the_others_go_on_when_the_first_is_cancelled(tiny_model: Path, engines: EngineFactory, steps: int) -> None:
    engine = engines(tiny_model)
    submit_outputs(engine, 3)
    for _ in range(steps):
        engine.step(decide=False)
    engine.cancel(1)
    out = run_all(engine)
    assert sorted(key for key in out if key != 1) == [2, 3]


def test_one_that_waits_can_be_cancelled(tiny_model: Path, engines: EngineFactory) -> None:
    engine = engines(tiny_model)
    submit_outputs(engine, 3)
    out = engine.step(decide=False)
    assert out is not None and out.started == [1] and out.waiting == 2
    engine.cancel(2)
    assert sorted(run_all(engine)) == [1, 3]


def test_others_run_while_the_siblings_wait(tiny_model: Path, engines: EngineFactory) -> None:
    engine = engines(tiny_model)
    submit_outputs(engine, 3)
    submit(engine, 9, [5, 6, 7], 2)
    started = []
    while engine.has_requests:
        out = engine.step(decide=False)
        started += out.started if out else []
    assert started[:2] == [1, 9] and sorted(started) == [1, 2, 3, 9]


def test_a_grammar_that_is_refused_for_the_first_is_refused_for_all(tiny_model: Path, engines: EngineFactory) -> None:
    engine = engines(tiny_model)
    submit_outputs(engine, 3, structured_outputs=StructuredOutputs("regex", "("))
    ends = {}
    while engine.has_requests:
        out = engine.step(decide=False)
        ends.update({end.key: end.reason for end in out.finished} if out else {})
    assert ends == {1: "invalid", 2: "invalid", 3: "invalid"}
