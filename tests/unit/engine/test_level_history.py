"""The history of levels that a request may ask for says enough to compute its every token again."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine.conftest import make_model, submit
from engine.test_oracle import scripted_levels
from morph_runtime.engine.histories import CACHED
from morph_runtime.engine.messages import SamplingParams, Submit
from morph_runtime.text.parameters import ParameterLimits
from tests.chaos.replay import Replayer, Told
from tests.oracle import oracle_for

if TYPE_CHECKING:
    from engine.conftest import EngineFactory
    from morph_runtime.engine.core import Engine

GREEDY = {"max_tokens": 30, "temperature": 0.0}
SAMPLINGS: list[dict[str, Any]] = [
    GREEDY,
    {**GREEDY, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "min_tokens": 4},
    {"max_tokens": 30, "temperature": 1.1, "top_p": 0.95, "seed": 7},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), kv_heads=2)


def follow(engine: Engine, told: dict[int, Told], until: int = 5000) -> None:
    """Step with scripted levels, and write down what is told."""
    scripted = scripted_levels(engine)
    for step in range(until):
        if not engine.has_requests:
            return
        scripted(step)
        out = engine.step(decide=False)
        for delta in out.tokens if out else ():
            one = told.setdefault(delta.key, Told())
            one.tokens.extend(delta.tokens)
            one.levels.extend(delta.levels)
            one.logprobs.extend(score.values[0] for score in delta.logprobs)
            one.runs.extend(delta.history)


def replayer_of(engine: Engine, folder: Path) -> Replayer:
    return Replayer(
        oracle_for(engine, folder),
        None,
        engine.parts.spec.eos_ids,
        ParameterLimits(max_tokens=256, max_outputs=1, vocab_size=200),
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_every_token_can_be_computed_again_from_the_history(model: Path, engines: EngineFactory, overlap: str) -> None:
    settings: dict[str, Any] = {"memory": {"kv_tokens": 160}, "cache": {"reuse": "exact"}, "overlap": overlap}
    engine = engines(model, morph={"order": "2,0,3,1", "ladder": ["w8", "w4"]}, **settings)
    replayer = replayer_of(engine, model)
    rng, told = random.Random(3), {}
    prompts = {}
    stem = [rng.randrange(1, 200) for _ in range(40)]
    for key in range(9):
        prompts[key] = [*stem[: rng.choice([8, 40])], *[rng.randrange(1, 200) for _ in range(rng.randint(1, 20))]]
        submit(engine, key, prompts[key], **SAMPLINGS[key % 3], history=True, logprobs=0)
    follow(engine, told, 40)
    successor = engines(model, morph={"order": "2,0,3,1", "ladder": ["w8", "w4"]}, **settings)  # as after a crash
    for key, one in told.items():
        sampling = SamplingParams(**SAMPLINGS[key % 3], ignore_eos=True, history=True, logprobs=0)
        if len(one.tokens) < 30:
            successor.submit(Submit(key, prompts[key], sampling, resumed=list(one.tokens)))
    follow(successor, told)
    assert engine.parts.scheduler.preemptions + successor.parts.scheduler.preemptions > 0, "the test must preempt"
    runs = [run for one in told.values() for run in one.runs]
    assert any(run[2] == CACHED for run in runs), "the test must share"
    assert len({run[2] for run in runs}) > 4, "the test must visit many levels"
    for key, one in told.items():
        params = SamplingParams(**SAMPLINGS[key % 3], ignore_eos=True)
        result = replayer.replay(prompts[key], params, one)
        assert not result.wrong, (key, result.wrong, one)
        assert result.compared == len(one.tokens) == 30
        assert result.ties == 0


def test_the_replay_notices_what_is_wrong(model: Path, engines: EngineFactory) -> None:
    engine = engines(model, memory={"kv_tokens": 512})
    replayer = replayer_of(engine, model)
    told: dict[int, Told] = {}
    prompt = [5, 6, 7]
    submit(engine, 1, prompt, **GREEDY, history=True, logprobs=0)
    follow(engine, told)
    right, params = told[1], SamplingParams(**GREEDY, ignore_eos=True)
    assert not replayer.replay(prompt, params, right).wrong
    swapped = [*right.tokens[:9], right.tokens[9] ^ 1, *right.tokens[10:]]
    likelihoods = [right.logprobs[0] + 0.01, *right.logprobs[1:]]
    elsewhere = [(first, end, (level + 1) % 5) for first, end, level in right.runs]
    for wrong in (
        replace(right, tokens=swapped),
        replace(right, levels=[level + 1 for level in right.levels]),
        replace(right, levels=right.levels[:-1]),
        replace(right, logprobs=likelihoods),
        replace(right, runs=elsewhere),
        replace(right, runs=right.runs[:-1]),
        replace(right, runs=[*right.runs[:2], *right.runs[3:]]),
    ):
        assert replayer.replay(prompt, params, wrong).wrong
    another = SamplingParams(**{**GREEDY, "repetition_penalty": 5.0}, ignore_eos=True)
    assert "should not have been chosen" in replayer.replay(prompt, another, right).wrong


def test_a_request_that_does_not_ask_is_told_no_history(model: Path, engines: EngineFactory) -> None:
    engine = engines(model)
    submit(engine, 1, [5, 6, 7], 3)
    submit(engine, 2, [5, 6, 7], 3, history=True)
    histories: dict[int, list[Any]] = {1: [], 2: []}
    while engine.has_requests:
        out = engine.step(decide=False)
        for delta in out.tokens if out else ():
            histories[delta.key] += delta.history
    assert histories == {1: [], 2: [(0, 3, 0), (3, 4, 0), (4, 5, 0)]}
