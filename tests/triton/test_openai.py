"""`morph openai` in front of a real server, asked by the real `openai` package."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from fake_engine import SEED_FAIL, SEED_STOP_EARLY
from openai_endpoint import Endpoint, write_chat_folder
from triton_server import ROOT, TritonServer
from wire_client import GrpcStream, fill, generate, pending, until

pytestmark = pytest.mark.triton
USER = {"role": "user", "content": "hello world"}
PROMPT = "[user] hello world [assistant] "


@pytest.fixture(scope="module")
def endpoint(server: TritonServer, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("openai")
    chat = write_chat_folder(folder / "chat", tiny_model, 512)
    endpoint = Endpoint(server, folder, "--model", str(chat))
    try:
        yield endpoint.wait_ready()
    finally:
        assert endpoint.stop() == 0, endpoint.log.read_text()


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> openai.OpenAI:
    return endpoint.client()


def chat(client: openai.OpenAI, **keys: Any) -> Any:
    return client.chat.completions.create(**{"model": "morph", "messages": [USER], "max_tokens": 12, **keys})


def test_a_chat_is_rendered_by_the_models_template(server: TritonServer, client: openai.OpenAI) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "world"}]},
    ]
    answer = chat(client, messages=messages, extra_body={"chat_template_kwargs": {"mood": "gladly "}})
    prompt = "[system] be brief [user] hello world [assistant] gladly "
    (choice,) = answer.choices
    same = generate(server, prompt, max_tokens=12, return_num_input_tokens=True)
    assert choice.message.role == "assistant" and choice.message.content == same["text_output"]
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert (answer.object, answer.model, choice.index) == ("chat.completion", "morph", 0)
    assert answer.usage.prompt_tokens == same["num_input_tokens"] and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_streamed_chat_has_the_same_text_and_ends_with_its_usage(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(c.choices[0].delta.content for c in parts) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].delta.role is None
    assert [c.choices[0].finish_reason for c in parts] == [None] * (len(parts) - 1) + ["length"]
    assert last.choices == [] and last.usage == whole.usage and all(c.usage is None for c in parts)
    assert {(c.id, c.object) for c in chunks} == {(parts[0].id, "chat.completion.chunk")}
    assert all(c.choices for c in chat(client, stream=True)), "no usage unless asked for"


def test_the_bytes_of_a_stream(endpoint: Endpoint) -> None:
    body = {"model": "morph", "prompt": "hello ☃", "max_tokens": 6, "stream": True}
    answer = httpx.post(f"{endpoint.url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in json.loads(events[0][6:])


def test_an_unlimited_chat_goes_to_the_end_of_the_context(client: openai.OpenAI) -> None:
    answer = chat(client, max_tokens=None)
    assert answer.usage.total_tokens == 512 and answer.choices[0].finish_reason == "length"
    assert chat(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


def test_stops_and_the_real_finish_reason(client: openai.OpenAI) -> None:
    (choice,) = chat(client, max_tokens=100, stop=["zzz", "[assis"]).choices
    assert choice.finish_reason == "stop" and choice.message.content == "[user] hello world "
    assert chat(client, max_tokens=100, seed=SEED_STOP_EARLY).choices[0].finish_reason == "stop"
    assert chat(client, stop=[], n=None).choices[0].finish_reason == "length"


def test_several_answers_to_several_prompts(server: TritonServer, client: openai.OpenAI) -> None:
    prompts = ["hello world", "the quick brown fox"]
    keys: dict[str, Any] = {"model": "morph", "prompt": prompts, "n": 2, "max_tokens": 9}
    answer = client.completions.create(**keys, echo=True)
    texts = [prompt + generate(server, prompt, max_tokens=9)["text_output"] for prompt in prompts]
    assert [c.text for c in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 36
    one = client.completions.create(model="morph", prompt=prompts[0], max_tokens=1)
    other = client.completions.create(model="morph", prompt=prompts[1], max_tokens=1)
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens + other.usage.prompt_tokens
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(**keys, echo=True, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [c.text for c in answer.choices]


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    (choice,) = chat(client, max_tokens=4, logprobs=True, top_logprobs=2).choices
    at = choice.logprobs.content[0]
    assert len(choice.logprobs.content) == 4
    assert "".join(t.token for t in choice.logprobs.content) == choice.message.content == PROMPT[:4]
    assert at.logprob == -0.5 and bytes(at.bytes).decode() == at.token
    assert [(t.token, t.logprob) for t in at.top_logprobs] == [("<|end|>", -0.25), (at.token, -0.5)]
    (choice,) = chat(client, max_tokens=4, logprobs=True).choices
    assert [at.top_logprobs for at in choice.logprobs.content] == [[]] * 4
    parts = [c.choices[0] for c in chat(client, max_tokens=4, logprobs=True, stream=True)]
    assert sum(len(p.logprobs.content) for p in parts) == 4


def test_log_probabilities_of_a_completion(client: openai.OpenAI) -> None:
    keys: dict[str, Any] = {"model": "morph", "prompt": "hello world", "max_tokens": 5, "logprobs": 2}
    (choice,) = client.completions.create(**keys).choices
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text and found.token_logprobs == [-0.5] * 5
    assert found.top_logprobs[0] == {"<|end|>": -0.25, found.tokens[0]: -0.5}
    assert [choice.text[at:][: len(t)] for at, t in zip(found.text_offset, found.tokens, strict=True)] == found.tokens
    offsets = [at for c in client.completions.create(**keys, stream=True) for at in c.choices[0].logprobs.text_offset]
    assert offsets == found.text_offset


def test_the_models_are_listed(endpoint: Endpoint, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("morph").id == "morph"
    assert model.max_model_len == 512
    assert endpoint.health() == 200
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 3000}, "temperature", "must be between 0 and 100"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"max_tokens": -1}, "max_tokens", "at least 1"),
    ({"max_tokens": 512}, "max_tokens", "must be at most"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "'text'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "refuses this conversation: no tools here"),
    ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "messages", "cannot be a variable"),
    ({"extra_body": {"tempratur": 1}}, "tempratur", "unknown parameter"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"stop": ["x"] * 99}, "stop", "at most 32"),
    ({"stop": 5}, "stop", "valid string"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs", "between 0 and 20"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "at most 0 items"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "schema"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "'json_schema'"),
    ({"seed": 2**63}, "seed", "between"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keys, param, said", BAD, ids=[f"{param} {said}" for _, param, said in BAD])
def test_bad_input_is_a_400_that_names_the_parameter(
    client: openai.OpenAI, keys: dict[str, Any], param: str, said: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, stream=stream, **keys)
    error = caught.value
    assert error.type == "invalid_request_error" and (error.param or "").startswith(param), error
    assert said in error.message


def test_a_prompt_beyond_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt: the prompt has 600 tokens") as caught:
        client.completions.create(model="morph", prompt="z" * 600)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_bodies_and_places_that_are_none(endpoint: Endpoint) -> None:
    def ask(method: str, path: str, content: bytes = b"") -> tuple[int, dict[str, Any]]:
        answer = httpx.request(
            method, endpoint.url + path, content=content, headers={"content-type": "application/json"}
        )
        return answer.status_code, answer.json()["error"]

    assert ask("POST", "/v1/completions", b"{")[0] == 400
    assert ask("POST", "/v1/completions", b"[]")[0] == 400
    assert ask("POST", "/v1/completions", b'{"model": "morph"}') == (
        400,
        {
            "message": "prompt: the parameter is required.",
            "type": "invalid_request_error",
            "param": "prompt",
            "code": None,
        },
    )
    assert ask("POST", "/v1/completions", b'{"model": "x", "prompt": "x"}')[0] == 404
    assert ask("GET", "/v1/completions")[0] == 405
    assert ask("GET", "/v2/models")[0] == 404


def test_an_error_in_mid_stream_is_an_event(client: openai.OpenAI) -> None:
    stream = chat(client, stream=True, seed=SEED_FAIL)
    with pytest.raises(openai.APIError, match="it went wrong"):
        list(stream)


def running(server: TritonServer) -> float:
    return server.metric("vllm:num_requests_running")


@pytest.mark.parametrize("stream, n", [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_a_client_that_leaves_frees_the_engine(server: TritonServer, endpoint: Endpoint, stream: bool, n: int) -> None:
    until(lambda: running(server) == 0)
    cancelled = server.metric("morph_requests_total", outcome="cancelled")
    body = json.dumps({"model": "morph", "prompt": "hello world", "max_tokens": 490, "stream": stream, "n": n}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with server.hold(), socket.create_connection(("127.0.0.1", endpoint.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: running(server) == n, what="running requests")
        if stream:
            assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()
        done = cancelled + n
        until(lambda: server.metric("morph_requests_total", outcome="cancelled") == done, what="cancelled requests")
        until(lambda: running(server) == 0, what="an idle engine")


def test_a_full_queue_is_429_and_a_client_in_the_queue_can_leave(
    narrow: TritonServer, tmp_path: Path, tiny_model: Path
) -> None:
    endpoint = Endpoint(narrow, tmp_path).wait_ready()
    try:
        client = endpoint.client()
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            chat(client)
        with narrow.hold():
            streams = fill(narrow)
            leaving = Endpoint.client(endpoint).with_options(timeout=0.3)
            with pytest.raises(openai.APITimeoutError):
                leaving.completions.create(model="morph", prompt="in the queue", stream=True)
        # Triton looks at what was cancelled in its queue only when the queue moves.
        for stream in streams:
            stream.rest()
        until(lambda: pending(narrow) == 0, what="the leaving of the one in the queue")
        with narrow.hold():
            streams = fill(narrow)
            queued = [GrpcStream(narrow).ask("queued", {"max_tokens": 1}) for _ in range(6)]
            until(lambda: pending(narrow) == 6)
            for keys in ({"stream": True}, {"stream": False}, {"n": 3}):
                with pytest.raises(openai.RateLimitError, match="Exceeds maximum queue size") as caught:
                    client.completions.create(model="morph", prompt="one too many", **keys)
                assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "queue_full"
        for stream in streams + queued:
            stream.rest()
    finally:
        assert endpoint.stop() == 0


def test_a_server_that_is_not_there_is_503(server: TritonServer, endpoint: Endpoint, tmp_path: Path) -> None:
    gone = TritonServer.__new__(TritonServer)
    gone.grpc = 1  # a port where nothing listens
    lonely = Endpoint(gone, tmp_path)
    try:
        until(lambda: lonely.health() == 503, what="the endpoint")
        with pytest.raises(openai.InternalServerError) as caught:
            lonely.client().completions.create(model="morph", prompt="x")
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
    finally:
        assert lonely.stop() == 0


def test_the_end_waits_for_open_streams(server: TritonServer, tmp_path: Path) -> None:
    endpoint = Endpoint(server, tmp_path, "--drain-seconds", "100", "--workers", "2").wait_ready()
    stream = endpoint.client().completions.create(model="morph", prompt="hello world", max_tokens=200, stream=True)
    first = next(iter(stream))
    endpoint.process.terminate()
    rest = [chunk.choices[0] for chunk in stream]
    assert first.choices[0].text and rest[-1].finish_reason == "length"
    assert endpoint.process.wait(100) == 0


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_the_product_answers_in_the_form_of_a_schema(real: TritonServer, tmp_path: Path) -> None:
    chat_folder = write_chat_folder(tmp_path / "chat", ROOT / "models" / "morph-demo", 2048)
    endpoint = Endpoint(real, tmp_path, "--model", str(chat_folder), "--served-model-name", "demo").wait_ready()
    try:
        client = endpoint.client()
        form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
        for seed in range(2):
            answer = chat(client, model="demo", response_format=form, seed=seed, max_tokens=200)
            assert answer.choices[0].finish_reason == "stop"
            jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
        asked = {"model": "demo", "seed": 11, "max_tokens": 24, "n": 2}
        first, again = (chat(client, **asked).choices for _ in range(2))
        assert [c.message.content for c in first] == [c.message.content for c in again]
        assert first[0].message.content != first[1].message.content
        (choice,) = chat(client, model="demo", max_tokens=24, temperature=0, logit_bias={"5": -100}).choices
        assert choice.message.content
    finally:
        assert endpoint.stop() == 0
