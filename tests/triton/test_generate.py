"""Text over HTTP, SSE and gRPC: the deltas, the outputs, the FINAL."""

from __future__ import annotations

import json

import pytest

from fake_engine import SEED_STOP_EARLY
from triton_server import TritonServer
from wire_client import GrpcStream, generate, post, sse, tensor, text_of

pytestmark = pytest.mark.triton

PROMPTS = ["hello world", "naïve café ☃ 😀", "日本語のテキスト", "tab\tnewline\n", "x"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_deltas_of_sse_and_grpc_join_to_the_whole_text(server: TritonServer, prompt: str) -> None:
    whole = generate(server, prompt, max_tokens=40)["text_output"]
    assert whole and whole.rstrip("\ufffd") in prompt * 40
    assert "".join(event["text_output"] for event in sse(server, prompt, max_tokens=40)) == whole
    assert text_of(GrpcStream(server).ask(prompt, {"max_tokens": 40}).rest()) == whole


def test_the_prompt_stands_in_front_unless_excluded(server: TritonServer) -> None:
    default = post(server, {"text_input": "hello world", "max_tokens": 4})[1]["text_output"]
    included = post(server, {"text_input": "hello world", "max_tokens": 4, "exclude_input_in_output": False})[1]
    without = generate(server, "hello world", max_tokens=4)["text_output"]
    assert default == included["text_output"] == "hello world" + without


def test_final_rides_on_the_last_text_and_no_response_is_empty(server: TritonServer) -> None:
    responses = GrpcStream(server).ask("hello ☃ 😀", {"max_tokens": 30}).rest()
    assert [r.final for r in responses] == [False] * (len(responses) - 1) + [True]
    assert all(r.outputs["text_output"][0] for r in responses)
    assert all(set(r.outputs) == {"text_output"} for r in responses)


def test_every_output_that_was_asked_for_is_there(server: TritonServer) -> None:
    names = ("finish_reason", "num_input_tokens", "num_output_tokens", "morph_level", "rung_share")
    asked = {f"return_{name}": True for name in names}
    responses = GrpcStream(server).ask("hello ☃ 😀", {"max_tokens": 30}, **asked).rest()
    outputs = [r.outputs for r in responses]
    assert [o["finish_reason"][0] for o in outputs] == ["None"] * (len(outputs) - 1) + ["length"]
    assert len({o["num_input_tokens"][0] for o in outputs}) == 1 and outputs[0]["num_input_tokens"][0] > 0
    assert sum(o["num_output_tokens"][0] for o in outputs) == 30
    assert [len(o["morph_level"]) for o in outputs] == [o["num_output_tokens"][0] for o in outputs]
    assert [level for o in outputs for level in o["morph_level"]] == [0, 1, 2, 3] + [4] * 26
    for output in outputs:
        assert sum(json.loads(output["rung_share"][0]).values()) == pytest.approx(1.0)
    last = json.loads(outputs[-1]["rung_share"][0])
    assert last["w4"] == pytest.approx((0.25 + 0.5 + 0.75 + 26) / 30)


def test_a_single_response_has_the_outputs_too(server: TritonServer) -> None:
    body = generate(
        server, "hello world", max_tokens=6, return_finish_reason=True, return_num_output_tokens=True,
        return_num_input_tokens=True, return_morph_level=True,
    )  # fmt: skip
    assert body["finish_reason"] == "length" and body["num_output_tokens"] == 6 and len(body["morph_level"]) == 6


def test_eos_ends_with_stop(server: TritonServer) -> None:
    body = generate(
        server, "hello world", max_tokens=60, seed=SEED_STOP_EARLY, return_finish_reason=True,
        return_num_output_tokens=True,
    )  # fmt: skip
    assert (body["finish_reason"], body["num_output_tokens"]) == ("stop", 4)
    assert "<|end|>" not in body["text_output"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens(server: TritonServer, stream: bool, include: bool) -> None:
    sampling = {"max_tokens": 100, "stop": ["dhe", "qqq"], "include_stop_str_in_output": include}
    before = server.metric("morph_requests_total", outcome="stop")
    responses = GrpcStream(server).ask(
        "hello world", sampling, stream=stream, return_finish_reason=True, exclude_input_in_output=True
    ).rest()  # fmt: skip
    assert text_of(responses) == "hello worl" + ("dhe" if include else "")
    assert responses[-1].outputs["finish_reason"] == ["stop"]
    if not stream:
        assert len(responses) == 1
    assert server.metric("morph_requests_total", outcome="stop") >= before


def test_stop_as_an_input_of_generate(server: TritonServer) -> None:
    assert generate(server, "hello world", max_tokens=50, stop=["zz", " wor"])["text_output"] == "hello"
    assert generate(server, "hello world", max_tokens=50, stop="rld")["text_output"] == "hello wo"


def test_parameters_alone_and_a_tensor_alone_and_both(server: TritonServer) -> None:
    outputs = {"return_num_output_tokens": True}
    assert generate(server, "abc", max_tokens=5, **outputs)["num_output_tokens"] == 5
    assert generate(server, "abc", sampling_parameters='{"max_tokens":"6"}', **outputs)["num_output_tokens"] == 6
    both = generate(server, "abc", sampling_parameters='{"max_tokens":7}', max_tokens=3, **outputs)
    assert both["num_output_tokens"] == 7
    assert generate(server, "abc", **outputs)["num_output_tokens"] == 16
    grpc = GrpcStream(server).ask_tensors([tensor("text_input", ["abc"])], parameters={"max_tokens": 4}).rest()
    assert text_of(grpc) == "abc" + "abca"


def test_reserved_parameters_are_not_sampling_parameters(server: TritonServer) -> None:
    status, body = post(
        server, {"text_input": "abc", "id": "r1", "priority": 1, "timeout": 9, "slo_class": "gold", "max_tokens": 2}
    )
    assert status == 200 and body["id"] == "r1"


def test_a_stream_input_on_generate_is_what_triton_makes_of_it(server: TritonServer) -> None:
    status, body = post(server, {"text_input": "hello world", "stream": True, "max_tokens": 4})
    assert status == 200 and "exactly 1 response" in body["error"]
    assert server.alive()
