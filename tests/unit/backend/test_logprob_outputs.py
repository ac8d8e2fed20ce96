"""The outputs matrix of Triton's vLLM backend for log probabilities, with the deterministic engine.

Its tokens are each the second most likely (-0.5) after the end token (-0.25).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fake_engine import EOS_ID, FakeEngine
from morph_backend.inputs import read_request
from morph_backend.outputs import logprob_dicts
from morph_backend.recorder import MetricsRecorder
from morph_backend.service import Service
from morph_runtime.config import EngineConfig
from morph_runtime.engine.messages import Finished, StepOutput, TokenLogprobs
from morph_runtime.text.tokenizer import Tokenizer
from tiny_model import EOS, tiny_tokenizer

TOKENS = 12
Ask = Any


@pytest.fixture
def engine() -> Iterator[tuple[Service, FakeEngine]]:
    service = Service(Tokenizer(tiny_tokenizer()), MetricsRecorder(), line=2)
    engine = FakeEngine(EngineConfig.from_mapping({"scheduler": {"max_num_seqs": 2}}), service)
    engine.step_s = 0.002
    service.attach(engine, engine.start())
    yield service, engine
    service.close()


@pytest.fixture
def ask(engine: tuple[Service, FakeEngine], make_sender: Any, make_request: Any) -> Ask:
    def ask(sampling: dict[str, Any], **inputs: Any) -> Any:
        sender = make_sender()
        text = json.dumps({"max_tokens": TOKENS, **sampling})
        request = make_request(
            text_input="hello world", sampling_parameters=text, exclude_input_in_output=True, **inputs
        )
        service, fake = engine
        fake.held.set()  # or on a busy machine all of a stream may be joined into one response
        service.handle(sender, functools.partial(read_request, request))
        fake.release_when(lambda: sender.responses or not inputs.get("stream"))
        assert sender.done.wait(60)
        return sender

    return ask


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("wants_logprobs", [None, False, True])
@pytest.mark.parametrize("wants_cumulative", [None, False, True])
def test_the_outputs_matrix(
    ask: Ask, stream: bool, logprobs: int | None, wants_logprobs: bool | None, wants_cumulative: bool | None
) -> None:
    flags = {"return_logprobs": wants_logprobs, "return_cumulative_logprob": wants_cumulative}
    given = {name: flag for name, flag in flags.items() if flag is not None}
    sampling = {} if logprobs is None else {"logprobs": logprobs}
    responses = ask(sampling, stream=stream, return_num_output_tokens=True, **given).responses
    assert len(responses) > 1 if stream else len(responses) == 1
    so_far, text = 0, ""
    for response in responses:
        assert response.error is None
        outputs = response.outputs
        count = outputs["num_output_tokens"][0]
        so_far += count
        assert ("cumulative_logprob" in outputs) is bool(wants_cumulative)
        if wants_cumulative:
            assert outputs["cumulative_logprob"].dtype == np.float32 and outputs["cumulative_logprob"].shape == (1,)
            assert outputs["cumulative_logprob"][0] == -0.5 * so_far
        assert ("logprobs" in outputs) is bool(wants_logprobs)
        if not wants_logprobs:
            continue
        assert outputs["logprobs"].shape == (1,)
        found = json.loads(outputs["logprobs"][0])
        if logprobs is None:
            assert found is None
            continue
        assert len(found) == count
        for at in found:
            chosen = at[next(iter(at))]
            assert (chosen["logprob"], chosen["rank"]) == (-0.5, 2)
            text += chosen["decoded_token"]
            assert len(at) == (2 if logprobs else 1)
            if logprobs:
                assert at[str(EOS_ID)] == {"logprob": -0.25, "rank": 1, "decoded_token": EOS}
    assert so_far == TOKENS
    if wants_logprobs and logprobs is not None:
        assert text == "".join(r.outputs["text_output"][0].decode() for r in responses)


def test_tokens_after_a_stop_string_count_in_neither(ask: Ask) -> None:
    flags = {"return_logprobs": True, "return_cumulative_logprob": True, "return_num_output_tokens": True}
    (response,) = ask({"max_tokens": 200, "logprobs": 0, "stop": ["world"]}, stream=False, **flags).responses
    count = response.outputs["num_output_tokens"][0]
    assert response.outputs["text_output"][0] == b"hello "
    assert len(json.loads(response.outputs["logprobs"][0])) == count < 40
    assert response.outputs["cumulative_logprob"][0] == -0.5 * count


def test_the_chosen_token_comes_first_and_only_once() -> None:
    found = logprob_dicts([TokenLogprobs(2, [7, 3, 7], [-0.9, -0.1, -0.9])], str)
    assert found == [
        {
            7: {"logprob": -0.9, "rank": 2, "decoded_token": "7"},
            3: {"logprob": -0.1, "rank": 1, "decoded_token": "3"},
        }
    ]
    assert found is not None and list(found[0]) == [7, 3]


def test_what_the_engine_finds_invalid_is_the_clients_error(
    engine: tuple[Service, FakeEngine], make_sender: Any, make_request: Any
) -> None:
    service, _ = engine
    sender = make_sender()
    request = make_request(text_input="hi", sampling_parameters='{"max_tokens": 400}')
    service.handle(sender, functools.partial(read_request, request))
    service.on_step(StepOutput([], [], [Finished(1, "invalid", "structured_outputs: no.")], 0, 0))
    assert sender.done.wait(60)
    assert (sender.error.code, str(sender.error)) == ("INVALID_ARG", "structured_outputs: no.")
