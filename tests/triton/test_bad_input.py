"""Bad input is answered with a sentence that names the field, while other streams go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from fake_engine import SEED_FAIL
from morph_client import InvalidRequest, MorphClient, SamplingParams
from triton_server import TritonServer
from wire_client import GrpcStream, Response, generate, post, sse, tensor, text_of, until

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def other_stream_goes_on(server: TritonServer) -> Iterator[None]:
    """Every test here runs beside a stream that must not notice."""
    stream = GrpcStream(server).ask("hello world", {"max_tokens": 60})
    stream.next()
    yield
    assert len(text_of(stream.rest())) > 100


def ask(server: TritonServer, body: dict[str, Any]) -> str:
    status, answer = post(server, body)
    assert status == 400, answer
    return str(answer["error"])


@pytest.mark.parametrize(
    "body, said",
    [
        ({"text_input": ""}, "text_input: the prompt must not be empty."),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens: must be between 1 and 512, but is 0."),
        ({"text_input": "a", "max_tokens": 512}, "max_tokens: must be at most 511 for this prompt"),
        ({"text_input": "z" * 600}, "text_input: the prompt has 600 tokens, but the model takes at most 511."),
        ({"text_input": "z" * 99999}, "text_input: the prompt has 99999 characters, too many tokens"),
        ({"text_input": "a", "temperature": -1}, "temperature: must be between 0 and 100, but is -1."),
        ({"text_input": "a", "temperature": "nan"}, "temperature: must be a finite number, but is 'nan'."),
        ({"text_input": "a", "max_tokens": "ten"}, "max_tokens: must be a whole number between 1 and 512"),
        ({"text_input": "a", "tempratur": 1}, "tempratur: unknown sampling parameter"),
        ({"text_input": "a", "n": 9}, "n: must be between 1 and 8, but is 9."),
        ({"text_input": "a", "logprobs": 21}, "logprobs: must be between 0 and 20"),
        ({"text_input": "a", "prompt_logprobs": 21}, "prompt_logprobs: must be between 0 and 20, but is 21."),
        ({"text_input": "a", "repetition_penalty": 0}, "repetition_penalty: must be above 0"),
        ({"text_input": "a", "structured_outputs": "{}x"}, "structured_outputs: the string must be JSON text."),
        ({"text_input": "a", "lora_name": "x"}, "LoRA feature is not enabled."),
        ({"text_input": "a", "sampling_parameters": "{"}, "sampling_parameters: not valid JSON"),
        ({"text_input": "a", "sampling_parameters": "[1]"}, "sampling_parameters: must be a JSON object"),
        ({"text_input": "a", "sampling_parameters": '{"top_p": NaN}'}, "NaN is not a number that JSON allows"),
        ({"text_input": "a", "stop": ["x"] * 99}, "stop: at most 32 stop strings, but there are 99."),
        ({"text_input": "a", "stop": [""]}, "stop: a stop string must not be empty."),
        ({"text_input": "a", "stop": "x" * 999}, "stop: a stop string may have at most 512 characters"),
        ({"text_input": "a", "image": ["aGk="]}, "image: images are not supported"),
        ({"text_input": "a", "embedding_request": "{}"}, "embedding_request: embeddings are not supported"),
        ({"text_input": "a", "slo_class": 5}, "slo_class: must be a name of at most 64"),
        ({"text_input": "a", "slo_class": "x" * 65}, "slo_class: must be a name of at most 64"),
    ],
)
def test_the_sentence_names_the_field(server: TritonServer, body: dict[str, Any], said: str) -> None:
    assert said in ask(server, body)


def test_streaming_with_the_prompt_has_vllms_exact_error(server: TritonServer) -> None:
    exact = "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."
    assert sse(server, "a", exclude_input_in_output=False) == [{"error": exact}]
    (response,) = GrpcStream(server).ask("a", exclude_input_in_output=False).rest()
    assert response.error.endswith(exact)


def test_control_characters_are_text(server: TritonServer) -> None:
    assert generate(server, "a\x00\x1b\n", max_tokens=4)["text_output"] == "a\x00\x1b\n"


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'{"text_input": 5}', b'{"stream": true}', b'{"text_input": ["a", "b"]}']
)
def test_bodies_that_triton_refuses(server: TritonServer, raw: bytes) -> None:
    status, body = post(server, raw)
    assert 400 <= status < 600 and "error" in body
    assert server.alive()


def one(server: TritonServer, inputs: list[Any]) -> Response:
    (response,) = GrpcStream(server).ask_tensors(inputs).rest()
    assert response.error
    return response


def test_invalid_utf8(server: TritonServer) -> None:
    assert (
        "text_input: must be valid UTF-8 (byte 1 is not)." in one(server, [tensor("text_input", [b"a\xff\xfe"])]).error
    )
    inputs = [tensor("text_input", ["a"]), tensor("sampling_parameters", [b"\xff"])]
    assert "sampling_parameters: must be valid UTF-8" in one(server, inputs).error
    inputs = [tensor("text_input", ["a"]), tensor("stop", [b"\xff"])]
    assert "stop: must be valid UTF-8" in one(server, inputs).error


@pytest.mark.parametrize(
    "inputs",
    [
        [tensor("text_input", ["a", "b"])],
        [tensor("text_input", [5])],
        [tensor("stream", [True])],
        [tensor("text_input", ["a"]), tensor("stream", [1])],
        [tensor("text_input", ["a"]), tensor("stream", [True, False])],
        [tensor("text_input", ["a"]), tensor("no_such_input", ["a"])],
    ],
    ids=["two prompts", "a number", "no prompt", "stream as int", "two flags", "unknown input"],
)
def test_wrong_types_and_shapes(server: TritonServer, inputs: list[Any]) -> None:
    response = one(server, inputs)
    assert any(name in response.error for name in ("text_input", "stream", "no_such_input", "inputs")), response.error
    assert server.alive()


@pytest.mark.parametrize("raw", [b"", b"\x05", b"\x05\x00\x00\x00ab", b"\xff\xff\xff\xffab", b"\x01\x00\x00\x00ab"])
def test_malformed_strings_on_the_wire(server: TritonServer, raw: bytes) -> None:
    request = service_pb2.ModelInferRequest(model_name="morph")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(raw)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        (answer,) = list(service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request])))
    assert answer.error_message
    assert generate(server, "abc", max_tokens=2)["text_output"] == "ab"


def test_a_request_that_fails_in_the_engine(server: TritonServer) -> None:
    events = sse(server, "hello world", max_tokens=9, seed=SEED_FAIL)
    assert events[-1] == {"error": "it went wrong"}
    assert [e for e in events if "error" in e] == events[-1:]


def test_many_bad_requests_at_once_are_all_answered(server: TritonServer) -> None:
    wrong: list[Any] = []

    def bad(number: int) -> None:
        status, body = post(server, {"text_input": "a", "max_tokens": -number})
        if status != 400 or "max_tokens" not in body["error"]:
            wrong.append((status, body))

    threads = [threading.Thread(target=bad, args=(n,)) for n in range(2, 34)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_status_is_invalid_argument(server: TritonServer) -> None:
    before = server.metric("morph_requests_total", outcome="rejected")
    assert post(server, {"text_input": ""})[0] == 400  # how Triton spells it in HTTP
    until(lambda: server.metric("morph_requests_total", outcome="rejected") >= before + 1)


def test_a_client_that_is_refused_again_and_again_harms_nobody(server: TritonServer) -> None:
    """With a header that asks for a gRPC status with each error, Triton 2.51 died of so many (bench/reliability)."""
    asked = 1500
    with MorphClient(f"127.0.0.1:{server.grpc}") as client, ThreadPoolExecutor(12) as threads:

        def refused(_: int) -> str:
            with pytest.raises(InvalidRequest) as caught:
                client.generate("hello", sampling=SamplingParams(temperature=-1))
            return str(caught.value)

        assert all(words.startswith("temperature: ") for words in threads.map(refused, range(asked)))
