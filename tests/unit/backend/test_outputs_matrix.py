"""Every output of docs/wire.md: there exactly if asked for, on each response, with its type and shape."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from fake_engine import CACHED_TOKENS, EOS_ID, FakeEngine
from morph_backend.inputs import LEAN, Wants, read_request
from morph_backend.recorder import MetricsRecorder
from morph_backend.service import Service
from morph_runtime.config import EngineConfig
from morph_runtime.text.tokenizer import Tokenizer
from tiny_model import tiny_tokenizer

TOKENS = 6
PROMPT = "hello world"
OPTIONAL: dict[str, tuple[Any, str]] = {
    "finish_reason": (np.object_, "n"),
    "cumulative_logprob": (np.float32, "n"),
    "logprobs": (np.object_, "n"),
    "num_input_tokens": (np.uint32, ""),
    "num_output_tokens": (np.uint32, "n"),
    "morph_level": (np.int32, "tokens"),
    "rung_share": (np.object_, "n"),
    "num_cached_tokens": (np.uint32, "1"),
    "prompt_logprobs": (np.object_, "1"),
    "recomputed_at": (np.int32, "events"),
    "level_history": (np.object_, "n"),
}
"""Type and shape: one per output, one in all, one per new token, one per event (none here), or a scalar."""


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service(Tokenizer(tiny_tokenizer()), MetricsRecorder(), line=2)
    engine = FakeEngine(EngineConfig.from_mapping({"scheduler": {"max_num_seqs": 4}}), service)
    engine.step_s = 0.002
    service.attach(engine, engine.start())
    yield service
    service.close()


@pytest.fixture
def ask(service: Service, make_sender: Any, make_request: Any) -> Any:
    def ask(sampling: dict[str, Any], **inputs: Any) -> list[dict[str, Any]]:
        sender = make_sender()
        text = json.dumps({"max_tokens": TOKENS, **sampling})
        request = make_request(text_input=PROMPT, sampling_parameters=text, exclude_input_in_output=True, **inputs)
        engine = service._engine
        assert isinstance(engine, FakeEngine)
        engine.held.set()  # or on a busy machine all of a stream may be joined into one response
        service.handle(sender, functools.partial(read_request, request))
        engine.release_when(lambda: sender.responses or not inputs.get("stream"))
        assert sender.done.wait(60) and (sender.finals, sender.misuse) == (1, [])
        assert not any(response.error for response in sender.responses)
        return [response.outputs for response in sender.responses]

    return ask


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", sorted(set(OPTIONAL) - {"num_output_tokens"}))
def test_an_output_is_there_exactly_if_asked_for(ask: Any, name: str, n: int, stream: bool) -> None:
    for asked, logprobs, prompt_logprobs in product((None, False, True), (None, 0, 2), (None, 1)):
        sampling = {"n": n, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        flags = {"return_num_output_tokens": True} | ({} if asked is None else {f"return_{name}": asked})
        responses = ask(sampling, stream=stream, **flags)
        assert len(responses) > 1 if stream else len(responses) == 1
        for outputs in responses:
            assert outputs["text_output"].shape == (n,)
            assert set(outputs) - {"num_output_tokens", "text_output"} <= {name}
            assert (name in outputs) is bool(asked)
            if asked:
                dtype, shape = OPTIONAL[name]
                sizes = {"n": (n,), "1": (1,), "": (), "tokens": (int(sum(outputs["num_output_tokens"])),)}
                sizes["events"] = (0,)
                assert (outputs[name].dtype, outputs[name].shape) == (dtype, sizes[shape])


@pytest.mark.parametrize("stream", [False, True])
def test_num_output_tokens_alone_decides_about_itself(ask: Any, stream: bool) -> None:
    assert all(list(outputs) == ["text_output"] for outputs in ask({}, stream=stream))
    asked = ask({}, stream=stream, return_num_output_tokens=True)
    assert sum(int(outputs["num_output_tokens"][0]) for outputs in asked) == TOKENS


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_everything_at_once_says_what_it_should(ask: Any, n: int, stream: bool) -> None:
    flags = dict.fromkeys((f"return_{name}" for name in OPTIONAL), True)
    responses = ask({"n": n, "logprobs": 0, "prompt_logprobs": 1}, stream=stream, **flags)
    for outputs in responses[:-1]:
        assert set(outputs["finish_reason"]) == {b"None"}
    assert set(responses[-1]["finish_reason"]) == {b"length"}
    assert {int(outputs["num_cached_tokens"][0]) for outputs in responses} == {CACHED_TOKENS}
    prompt_tokens = {int(outputs["num_input_tokens"]) for outputs in responses}
    assert len(prompt_tokens) == 1
    first, *later = [json.loads(outputs["prompt_logprobs"][0]) for outputs in responses]
    assert later == [None] * len(later)
    assert [first[0], len(first)] == [None, *prompt_tokens]
    assert all(next(iter(at.values()))["logprob"] == -1.0 and str(EOS_ID) in at for at in first[1:])
    assert "".join(next(iter(at.values()))["decoded_token"] for at in first[1:]) in PROMPT


def test_prompt_log_probabilities_are_null_unless_the_parameter_is_set(ask: Any) -> None:
    (outputs,) = ask({}, return_prompt_logprobs=True)
    assert outputs["prompt_logprobs"].tolist() == [b"null"]


def test_this_matrix_has_every_optional_output() -> None:
    assert set(OPTIONAL) == set(Wants.__dataclass_fields__)


@pytest.mark.parametrize("n", [1, 2])
def test_lean_chunks_bring_what_does_not_change_at_the_beginning_and_with_an_end_alone(ask: Any, n: int) -> None:
    flags = dict.fromkeys((f"return_{name}" for name in OPTIONAL), True)
    constant = {"finish_reason", "num_input_tokens", "num_cached_tokens"}
    responses = ask({"n": n}, stream=True, parameters=json.dumps({LEAN: True}), **flags)
    assert len(responses) > 1
    assert set(responses[0]) == set(responses[-1]) == {"text_output", *OPTIONAL}
    between = responses[1:-1]
    assert all(constant.isdisjoint(outputs) or any(outputs["finish_reason"] != b"None") for outputs in between)
    assert {"text_output", *OPTIONAL} - constant in map(set, between)
    assert sum(int(sum(outputs["num_output_tokens"])) for outputs in responses) == n * TOKENS
