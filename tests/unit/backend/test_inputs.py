from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from morph_backend.inputs import STREAM_ECHO_ERROR, read_request
from morph_runtime.errors import RequestError
from morph_runtime.text.parameters import ParameterLimits

LIMITS = ParameterLimits(max_tokens=100)


def test_defaults(make_request: Any) -> None:
    given = read_request(make_request(text_input="hi"), LIMITS)
    assert (given.text, given.stream, given.echo, given.slo_class) == ("hi", False, True, "")
    assert given.sampling.max_tokens == 16 and not given.wants.finish_reason


@pytest.mark.parametrize("stream, exclude, echo", [(False, True, False), (False, False, True), (True, True, False)])
def test_echo(make_request: Any, stream: bool, exclude: bool, echo: bool) -> None:
    request = make_request(text_input="hi", stream=stream, exclude_input_in_output=exclude)
    assert read_request(request, LIMITS).echo is echo


def test_streaming_with_echo_is_vllms_error(make_request: Any) -> None:
    with pytest.raises(RequestError) as caught:
        read_request(make_request(text_input="hi", stream=True, exclude_input_in_output=False), LIMITS)
    assert str(caught.value) == STREAM_ECHO_ERROR


def test_parameters_count_when_there_is_no_tensor(make_request: Any) -> None:
    parameters = (
        '{"max_tokens": 5, "priority": 1, "timeout": 9, "id": "x", "sequence_id": 4, "triton_a": 1, "headers": "h"}'
    )
    assert read_request(make_request(parameters, text_input="hi"), LIMITS).sampling.max_tokens == 5
    request = make_request(parameters, text_input="hi", sampling_parameters='{"max_tokens": 7}')
    assert read_request(request, LIMITS).sampling.max_tokens == 7


def test_the_service_class_is_a_parameter_of_its_own(make_request: Any) -> None:
    request = make_request('{"slo_class": "gold"}', text_input="hi", sampling_parameters="{}")
    assert read_request(request, LIMITS).slo_class == "gold"


def test_lean_chunks_are_asked_for_by_a_parameter_that_is_a_bool(make_request: Any) -> None:
    assert read_request(make_request('{"lean_chunks": true}', text_input="hi"), LIMITS).lean_chunks
    assert not read_request(make_request(text_input="hi"), LIMITS).lean_chunks
    with pytest.raises(RequestError, match="lean_chunks"):
        read_request(make_request('{"lean_chunks": "yes"}', text_input="hi"), LIMITS)


def test_stop_as_tensor_wins(make_request: Any) -> None:
    request = make_request(text_input="hi", stop=["a", "b"], sampling_parameters='{"stop": "c", "max_tokens": 3}')
    assert read_request(request, LIMITS).sampling.stop == ("a", "b")
    assert read_request(request, LIMITS).sampling.max_tokens == 3
    none = make_request(text_input="hi", stop=np.array([], dtype=np.object_))
    assert read_request(none, LIMITS).sampling.stop == ()


@pytest.mark.parametrize(
    "inputs, field",
    [
        ({}, "text_input"),
        ({"text_input": 5}, "text_input"),
        ({"text_input": ["a", "b"]}, "text_input"),
        ({"text_input": b"\xff"}, "text_input"),
        ({"text_input": "a", "stream": 1}, "stream"),
        ({"text_input": "a", "stream": [True, True]}, "stream"),
        ({"text_input": "a", "sampling_parameters": 5}, "sampling_parameters"),
        ({"text_input": "a", "sampling_parameters": b"\xff"}, "sampling_parameters"),
        ({"text_input": "a", "stop": 5}, "stop"),
        ({"text_input": "a", "stop": [""]}, "stop"),
        ({"text_input": "a", "stop": [b"\xff"]}, "stop"),
        ({"text_input": "a", "image": ["x"]}, "image"),
        ({"text_input": "a", "embedding_request": "{}"}, "embedding_request"),
        ({"text_input": "a", "return_logprobs": 1}, "return_logprobs"),
        ({"text_input": "a", "return_cumulative_logprob": [True, True]}, "return_cumulative_logprob"),
        ({"text_input": "a", "return_morph_level": "yes"}, "return_morph_level"),
    ],
)
def test_bad_inputs_name_themselves(make_request: Any, inputs: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_request(make_request(**inputs), LIMITS)
    assert caught.value.field == field


@pytest.mark.parametrize("parameters", ['{"slo_class": 5}', '{"slo_class": "é"}', '{"max_tokens": "x"}', "{"])
def test_bad_parameters(make_request: Any, parameters: str) -> None:
    with pytest.raises(RequestError):
        read_request(make_request(parameters, text_input="hi"), LIMITS)


def test_a_cumulative_logprob_makes_the_engine_score_tokens(make_request: Any) -> None:
    given = read_request(make_request(text_input="hi", return_cumulative_logprob=True), LIMITS)
    assert given.wants.cumulative_logprob and given.sampling.score and given.sampling.logprobs is None
    assert not read_request(make_request(text_input="hi", return_logprobs=True), LIMITS).sampling.score


def test_flags_that_ask_for_nothing_pass(make_request: Any) -> None:
    request = make_request(
        text_input="hi", return_logprobs=False, image=np.array([], dtype=np.object_), embedding_request=""
    )
    assert read_request(request, LIMITS).text == "hi"
