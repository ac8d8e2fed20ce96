"""Whatever a client sends: an answer, or one sentence that is the client's fault. Never more, never less."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.test_service import House, finished, until
from morph_backend.inputs import read_request

NAMES = (
    "text_input", "stream", "sampling_parameters", "exclude_input_in_output", "return_logprobs", "stop", "image",
    "return_num_output_tokens", "embedding_request",
)  # fmt: skip
KEYS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids",
    "logit_bias", "bad_words", "logprobs", "prompt_logprobs", "repetition_penalty", "presence_penalty", "n",
    "ignore_eos", "structured_outputs", "guided_json", "best_of",
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 1e308, 5e-324])
)
LEAVES = (
    st.none() | st.booleans() | NUMBERS | st.text(max_size=12) | st.sampled_from(["nan", "1e999", "\x00", "\ud800"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6
)
SAMPLING = st.one_of(
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), VALUES, max_size=6).map(json.dumps),
    st.text(max_size=30),
    st.sampled_from(
        ["[" * 100_000, '{"a":' * 50_000, '{"stop": [' * 20_000, '{"max_tokens": ' + "9" * 5000 + "}", "\ufeff{}"]
    ),
)
ARRAYS = st.one_of(
    st.lists(st.binary(max_size=20), max_size=3).map(lambda items: np.array(items, dtype=np.object_)),
    st.lists(st.text(max_size=20), max_size=3).map(lambda items: np.array(items, dtype=np.object_)),
    st.lists(st.booleans(), max_size=3).map(np.array),
    st.lists(st.floats(), max_size=3).map(np.array),
    st.sampled_from([np.zeros((1, 1), np.bool_), np.zeros((0,), np.object_), np.array(None), np.array([None])]),
)
REQUESTS = st.fixed_dictionaries(
    {"text_input": st.text(max_size=40) | st.binary(max_size=40) | ARRAYS},
    optional={
        "sampling_parameters": SAMPLING | ARRAYS,
        "stream": st.booleans() | ARRAYS,
        "stop": ARRAYS,
        **{name: ARRAYS | st.booleans() for name in NAMES[3:]},
    },
)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    from backend.conftest import Request, Sender

    house = House(Sender, Request)
    house.engine.step_s = 0.0002
    yield house
    house.service.close()


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    REQUESTS,
    st.none() | st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3).map(json.dumps) | st.text(max_size=9),
)
def test_any_request_gets_one_end(house: House, inputs: dict[str, Any], parameters: str | None) -> None:
    sender, request = house._make_sender(), house._make_request(parameters or "", **inputs)
    house.service.handle(sender, functools.partial(read_request, request))
    error = finished(sender).error
    assert error is None or error.code == "INVALID_ARG", (error.code, str(error))
    assert error is None or ("\n" not in str(error).strip() and len(str(error)) < 2000)
    until(lambda: house.service.num_open == 0)
    assert house.service.healthy
    assert not house.counts("morph_backend_errors_total")


@pytest.mark.parametrize(
    "sampling",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        json.dumps({"stop": ["\x00\x1b[2J", "\u202e", "\ud800"], "max_tokens": 3}),
        json.dumps({f"key_{at}": at for at in range(50_000)}),
        json.dumps({"logit_bias": {str(at): 1 for at in range(100_000)}}),
        json.dumps({"stop": ["x" * 100_000] * 10}),
        json.dumps({"bad_words": ["x" * 10_000] * 1000}),
        json.dumps({"structured_outputs": {"regex": "(" * 30_000}}),
        json.dumps({"structured_outputs": {"json": {"$ref": "#"}}}),
        '{"max_tokens": ' + "9" * 100_000 + "}",
    ],
    ids=["arrays", "objects", "control characters", "many keys", "many biases", "long stops", "many bad words",
         "parentheses", "schema that means itself", "a long number"],
)  # fmt: skip
def test_a_bomb_is_the_clients_error(house: House, sampling: str) -> None:
    error = finished(house.ask(sampling)).error
    assert error is None or error.code == "INVALID_ARG", (error.code, str(error)[:200])
