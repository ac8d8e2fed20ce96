"""Sampling parameters through the whole engine: what a seed gives does not depend on company or preemption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.conftest import EngineFactory, run_all, submit

PROMPT = [5, 6, 7, 8]
LENGTH = 40
REQUESTS: dict[int, dict[str, Any]] = {
    1: {"seed": 1},
    2: {"seed": 1, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    3: {"seed": 1, "bad_word_ids": ((5,), (6, 7)), "logit_bias": ((9, 3.0),)},
    4: {"seed": 1, "min_p": 0.05, "top_k": 50, "top_p": 0.95},
    5: {"seed": 1, "temperature": 0.7, "logprobs": 2},
}


def start(engine: Any, key: int) -> None:
    submit(engine, key, PROMPT, LENGTH, **{"temperature": 1.0, **REQUESTS[key]})


@pytest.fixture
def alone(engines: EngineFactory, tiny_model: Path) -> dict[int, list[int]]:
    """The tokens of each request when it has the engine for itself."""
    engine = engines(tiny_model)
    found = {}
    for key in REQUESTS:
        start(engine, key)
        found |= run_all(engine)
    return found


def test_company_changes_nothing(engines: EngineFactory, tiny_model: Path, alone: dict[int, list[int]]) -> None:
    engine = engines(tiny_model)
    for key in REQUESTS:
        start(engine, key)
    assert run_all(engine) == alone


def test_preemption_changes_nothing(engines: EngineFactory, tiny_model: Path, alone: dict[int, list[int]]) -> None:
    engine = engines(tiny_model, memory={"kv_tokens": 80}, model={"max_model_len": 64})
    for key in REQUESTS:
        start(engine, key)
    assert run_all(engine) == alone
    assert engine.parts.scheduler.preemptions > 0


def test_the_features_do_something(alone: dict[int, list[int]]) -> None:
    assert len({tuple(tokens) for tokens in alone.values()}) == len(REQUESTS)
    assert len(set(alone[2])) > len(set(alone[1]))
    assert 5 not in alone[3]
    assert (6, 7) not in set(zip(alone[3], alone[3][1:], strict=False))


def test_each_token_comes_with_its_scores(engines: EngineFactory, tiny_model: Path) -> None:
    engine = engines(tiny_model)
    start(engine, 5)
    start(engine, 1)
    while engine.has_requests:
        out = engine.step(decide=False)
        for delta in out.tokens if out else ():
            assert len(delta.logprobs) == (1 if delta.key == 5 else 0)
            for token, scores in zip(delta.tokens, delta.logprobs, strict=False):
                assert scores.ids[0] == token and len(scores.ids) == len(scores.values) == 3
                assert scores.values[1] >= scores.values[2] and scores.values[0] <= scores.values[1]
