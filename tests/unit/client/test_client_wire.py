from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
from client_fakes import bytes_tensor, response, text_response

from morph_client import wire
from morph_client.errors import InvalidRequest, ServerError
from morph_client.types import CompletionBuilder, RungShare, SamplingParams, TokenLogprob


def build(**changes: Any) -> wire.Request:
    given: dict[str, Any] = {
        "model": "morph",
        "sampling": None,
        "stream": True,
        "priority": 0,
        "timeout_s": None,
        "request_id": None,
        "slo_class": None,
        "details": True,
    }
    prompt = changes.pop("prompt", "hello")
    return wire.build_request(prompt, **{**given, **changes})


def inputs_of(message: Any) -> dict[str, bytes]:
    return {t.name: raw for t, raw in zip(message.inputs, message.raw_input_contents, strict=True)}


def test_a_request_carries_prompt_sampling_and_options() -> None:
    request = build(
        prompt="grüße",
        sampling=SamplingParams(max_tokens=3, stop=("a", "b"), extra={"n": 1}),
        priority=1,
        timeout_s=0.25,
        request_id="r",
        slo_class="gold",
    )
    message = request.to_message()
    inputs = inputs_of(message)
    assert inputs["text_input"][4:].decode() == "grüße"
    assert json.loads(inputs["sampling_parameters"][4:]) == {"max_tokens": 3, "stop": ["a", "b"], "n": 1}
    assert inputs["stream"] == b"\x01" and inputs["exclude_input_in_output"] == b"\x01"
    assert message.id == "r" and message.parameters["priority"].uint64_param == 1
    assert message.parameters["timeout"].int64_param == 250_000
    assert message.parameters["slo_class"].string_param == "gold"


def test_only_streams_ask_for_lean_chunks() -> None:
    """A server that does not know the parameter takes it for one of sampling where no tensor brings these."""
    asks = [build(), build(stream=False), wire.mode_request("morph", "balanced", None, "")]
    assert ["lean_chunks" in ask.to_message().parameters for ask in asks] == [True, False, False]


def test_nested_parameters_are_sent_as_json_and_logprobs_ask_for_their_output() -> None:
    form = {"json": {"type": "object"}}
    sampling = SamplingParams(logit_bias={5: 1.5}, stop_token_ids=(1,), structured_outputs=form, logprobs=0)
    request = build(sampling=sampling)
    sent = json.loads(inputs_of(request.to_message())["sampling_parameters"][4:])
    assert sent == {"logit_bias": {"5": 1.5}, "stop_token_ids": [1], "structured_outputs": form, "logprobs": 0}
    assert "return_logprobs" in request.flags and "return_logprobs" not in build().flags


def test_details_can_be_left_out_for_servers_that_do_not_know_them() -> None:
    assert not any("morph" in name or "rung" in name or "cached" in name for name in build(details=False).flags)
    assert "stream" not in build(stream=False).flags


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "\ud800"},
        {"priority": -1},
        {"timeout_s": 0.0},
        {"timeout_s": math.nan},
        {"sampling": SamplingParams(temperature=math.nan)},
        {"sampling": SamplingParams(extra={"x": object()})},
    ],
)
def test_what_cannot_be_sent_is_refused_here(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        build(**changes)


def test_a_response_becomes_a_chunk() -> None:
    message = text_response("hi", prompt_tokens=5, level=2, last=True, final=True).infer_response
    chunk = wire.decode(message, 0.5)
    assert chunk is not None
    assert (chunk.text, chunk.tokens, chunk.levels, chunk.finish_reason) == ("hi", 1, (2,), "length")
    assert chunk.rung_share == RungShare(0.75, 0.0, 0.25)
    assert chunk.num_input_tokens == 5 and chunk.arrival_s == 0.5


def test_each_output_gets_its_own_text_tokens_and_levels() -> None:
    share = json.dumps({"full": 0.5, "w8": 0.0, "w4": 0.5}).encode()
    ranked = json.dumps([{"7": {"logprob": -0.9, "rank": 2, "decoded_token": "a"}}]).encode()
    outputs = {
        "text_output": ("BYTES", bytes_tensor(b"ab", b"", b"c")),
        "finish_reason": ("BYTES", bytes_tensor(b"None", b"stop", b"None")),
        "num_output_tokens": ("UINT32", struct.pack("<3I", 2, 0, 1)),
        "morph_level": ("INT32", struct.pack("<3i", 0, 1, 4)),
        "rung_share": ("BYTES", bytes_tensor(share, share, share)),
        "logprobs": ("BYTES", bytes_tensor(b"[]", b"[]", ranked)),
        "num_cached_tokens": ("UINT32", struct.pack("<I", 32)),
    }
    chunk = wire.decode(response(outputs, False).infer_response, 0.0)
    assert chunk is not None and chunk.num_cached_tokens == 32
    assert [(o.text, o.tokens, o.levels, o.finish_reason) for o in chunk.outputs] == [
        ("ab", 2, (0, 1), None), ("", 0, (), "stop"), ("c", 1, (4,), None),
    ]  # fmt: skip
    assert [len(o.logprobs) for o in chunk.outputs] == [0, 0, 1]


def test_an_answer_is_complete_when_all_its_outputs_have_ended() -> None:
    def message(*reasons: bytes) -> Any:
        made = {
            "text_output": ("BYTES", bytes_tensor(*[b"x"] * len(reasons))),
            "finish_reason": ("BYTES", bytes_tensor(*reasons)),
            "num_output_tokens": ("UINT32", struct.pack(f"<{len(reasons)}I", *[1] * len(reasons))),
        }
        return response(made, False).infer_response

    reader = wire.ResponseReader()
    reader.read(message(b"stop", b"None"))
    with pytest.raises(ServerError, match="ended before its last response"):
        reader.check_complete()
    reader.read(message(b"stop", b"length"))
    reader.check_complete()


def test_tensors_that_disagree_on_the_number_of_outputs_break_the_contract() -> None:
    outputs = {
        "text_output": ("BYTES", bytes_tensor(b"a", b"b")),
        "finish_reason": ("BYTES", bytes_tensor(b"None")),
        "num_output_tokens": ("UINT32", struct.pack("<2I", 1, 1)),
    }
    with pytest.raises(ServerError, match="wire contract"):
        wire.decode(response(outputs, False).infer_response, 0.0)


def test_log_probabilities_are_read_in_their_order() -> None:
    ranked = {
        "7": {"logprob": -0.9, "rank": 2, "decoded_token": "a"},
        "3": {"logprob": -0.1, "rank": 1, "decoded_token": "b"},
    }
    outputs = {"text_output": ("BYTES", bytes_tensor(b"a"))}
    builder = CompletionBuilder()
    for raw in (json.dumps([ranked]), "null"):
        message = response({**outputs, "logprobs": ("BYTES", bytes_tensor(raw.encode()))}, False).infer_response
        chunk = wire.decode(message, 0.0)
        assert chunk is not None
        builder.add(chunk)
    assert builder.build().logprobs == ((TokenLogprob(7, "a", -0.9, 2), TokenLogprob(3, "b", -0.1, 1)),)


def test_a_response_of_a_plain_vllm_backend_is_understood() -> None:
    message = response({"text_output": ("BYTES", bytes_tensor(b"hi"))}, False).infer_response
    chunk = wire.decode(message, 0.0)
    assert chunk is not None
    assert chunk.text == "hi" and chunk.levels == () and chunk.rung_share is None and chunk.finish_reason is None


def test_typed_contents_are_read_as_well_as_raw_ones() -> None:
    message = response({}, False).infer_response
    message.outputs.add(name="text_output", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hi")
    chunk = wire.decode(message, 0.0)
    assert chunk is not None and chunk.text == "hi"


def test_a_response_without_outputs_is_no_chunk() -> None:
    assert wire.decode(response({}, True).infer_response, 0.0) is None


@pytest.mark.parametrize(
    "outputs",
    [
        {"other": ("BYTES", bytes_tensor(b"x"))},
        {"text_output": ("BYTES", b"\x09\x00\x00\x00short")},
        {"text_output": ("FP64", b"\x00" * 8)},
        {"text_output": ("BYTES", bytes_tensor(b"x")), "rung_share": ("BYTES", bytes_tensor(b"{}"))},
        {"text_output": ("BYTES", bytes_tensor(b"x")), "logprobs": ("BYTES", bytes_tensor(b"[3]"))},
    ],
)
def test_a_response_off_the_contract_is_an_error(outputs: dict[str, tuple[str, bytes]]) -> None:
    with pytest.raises(ServerError, match="wire contract"):
        wire.decode(response(outputs, False).infer_response, 0.0)


def test_a_completion_joins_its_chunks() -> None:
    builder = CompletionBuilder()
    for i, text in enumerate(("a ", "b ", "c")):
        message = text_response(text, prompt_tokens=4, level=i, last=i == 2, final=i == 2).infer_response
        chunk = wire.decode(message, 0.1 * (i + 1))
        assert chunk is not None
        builder.add(chunk)
    answer = builder.build()
    assert answer.text == "a b c" and answer.finish_reason == "length"
    assert answer.levels == (0, 1, 2) and answer.num_output_tokens == 3 and answer.num_input_tokens == 4
    assert answer.ttft_s == pytest.approx(0.1) and answer.e2e_s == pytest.approx(0.3)
    assert answer.token_arrivals_s == pytest.approx((0.1, 0.2, 0.3))


def test_a_stream_without_a_last_response_is_reported() -> None:
    reader = wire.ResponseReader()
    reader.read(text_response("a", prompt_tokens=1, level=0, last=False, final=False).infer_response)
    with pytest.raises(ServerError, match="cut off"):
        reader.check_complete()


@pytest.mark.parametrize("before", [0, 1])
def test_log_probabilities_of_the_prompt_come_with_one_chunk(before: int) -> None:
    ranked = {"7": {"logprob": -0.9, "rank": 2, "decoded_token": "a"}}
    builder = CompletionBuilder()
    for raw in (*["null"] * before, json.dumps([None, ranked]), "null"):
        made = {
            "text_output": ("BYTES", bytes_tensor(b"a")),
            "num_output_tokens": ("UINT32", struct.pack("<I", 1)),
            "prompt_logprobs": ("BYTES", bytes_tensor(raw.encode())),
        }
        chunk = wire.decode(response(made, False).infer_response, 0.0)
        assert chunk is not None
        builder.add(chunk)
    assert builder.build().prompt_logprobs == (None, (TokenLogprob(7, "a", -0.9, 2),))
    assert "return_prompt_logprobs" in build(sampling=SamplingParams(prompt_logprobs=0)).flags
    assert "return_prompt_logprobs" not in build().flags
