"""The parts of `morph openai` that need no server; the whole is tested in tests/triton/test_openai.py."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from client_fakes import REFUSALS, FakeTriton

from morph_client import AsyncMorphClient
from morph_client.errors import BadInput, DeadlineExceeded, InvalidRequest, MorphError, ServerError
from morph_client.openai.answers import Choice, likely, usage
from morph_client.openai.app import Served, build_app
from morph_client.openai.problems import from_server
from morph_client.openai.sampling import sampling_of
from morph_client.openai.server import listen
from morph_client.openai.shapes import TextRequest
from morph_client.types import TokenLogprob


def ask(triton: FakeTriton, body: dict[str, Any], path: str = "/v1/completions") -> httpx.Response:
    async def run() -> httpx.Response:
        async with AsyncMorphClient(triton.url) as client:
            transport = httpx.ASGITransport(build_app(client, Served("morph")), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                return await http.post(path, json={"model": "morph", **body})

    return asyncio.run(run())


STATUS = {"refuse": 400, "full": 429, "late": 503, "dead": 503, "broken": 500, "dropped": 503}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["", "as-a-status"])
@pytest.mark.parametrize("word", REFUSALS)
def test_the_servers_refusals_have_their_status(triton: FakeTriton, word: str, how: str, stream: bool) -> None:
    answer = ask(triton, {"prompt": f"{word} {how}", "stream": stream})
    assert answer.status_code == STATUS[word]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers.get("retry-after") == ("1" if STATUS[word] in (429, 503) else None)


def test_a_null_is_no_parameter_whatever_its_name(triton: FakeTriton) -> None:
    nothing = dict.fromkeys(("reasoning_effort", "prediction", "audio", "function_call", "best_of", "stop"))
    answer = ask(triton, {"prompt": "say it", "max_tokens": 2, **nothing})
    assert answer.status_code == 200, answer.text
    assert ask(triton, {"prompt": "say it", "reasoning_effort": "high"}).json()["error"]["param"] == "reasoning_effort"
    assert ask(triton, {"prompt": None}).json()["error"]["param"] == "prompt"


def test_the_older_names_of_structured_outputs_reach_the_server(triton: FakeTriton) -> None:
    for name, form in (("guided_choice", ["a", "b"]), ("guided_json", {"type": "object"}), ("guided_regex", "a+")):
        assert ask(triton, {"prompt": "say it", "max_tokens": 1, name: form}).status_code == 200
        (raw,) = [
            raw
            for tensor, raw in zip(
                triton.service.requests[-1].inputs, triton.service.requests[-1].raw_input_contents, strict=True
            )
            if tensor.name == "sampling_parameters"
        ]
        assert json.loads(raw[4:])[name] == form


def test_a_stream_that_breaks_off_ends_with_an_error_and_no_done(triton: FakeTriton) -> None:
    text = ask(triton, {"prompt": "cut", "stream": True, "max_tokens": 3}).text
    assert "the text may be cut off" in text.split("\n\n")[-2] and "[DONE]" not in text


@pytest.mark.parametrize(
    "error, status, param, code",
    [
        (InvalidRequest("top_p: must be above 0."), 400, "top_p", None),
        (InvalidRequest("text_input: must not be empty."), 400, "prompt", None),
        (InvalidRequest("max_tokens: exceed the context of 9 tokens."), 400, "max_tokens", "context_length_exceeded"),
        (InvalidRequest("No field is named here: at all."), 400, None, None),
        (BadInput("the template refuses"), 400, "prompt", None),
        (DeadlineExceeded("late"), 504, None, "deadline_exceeded"),
        (ServerError("broken"), 500, None, None),
    ],
)
def test_errors_name_the_parameter(error: MorphError, status: int, param: str | None, code: str | None) -> None:
    found = from_server(error, "prompt")
    assert (found.status, found.param, found.code) == (status, param, code)


def test_each_prompt_counts_once_in_the_usage() -> None:
    choices = [Choice(0, 0, prompt_tokens=5, tokens=2), Choice(1, 0, prompt_tokens=5, tokens=3)]
    choices.append(Choice(2, 1, prompt_tokens=7, tokens=4))
    assert usage(choices) == {"prompt_tokens": 12, "completion_tokens": 9, "total_tokens": 21}


def test_the_most_likely_tokens_without_the_chosen_one_in_front() -> None:
    chosen, first, second = TokenLogprob(5, "c", -3.0, 9), TokenLogprob(1, "a", -0.1, 1), TokenLogprob(2, "b", -0.2, 2)
    assert likely([chosen, first, second], 2) == [first, second]
    assert likely([second, first], 1) == [first] and likely([first], 0) == []


def test_the_listening_socket_names_its_protocol() -> None:
    """asyncio sets TCP_NODELAY on such sockets alone; without it each first token comes 40 ms late."""
    with listen("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP
        port = listening.getsockname()[1]
        with pytest.raises(BadInput, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use"):
            listen("127.0.0.1", port)


def test_wrong_options_are_one_sentence(morph: Callable[..., Any], tmp_path: Any) -> None:
    assert "--chat-template needs --model" in morph("openai", "--chat-template", tmp_path / "x").stderr
    assert "is not a folder" in morph("openai", "--model", tmp_path / "none").stderr
    assert "is not a gRPC address" in morph("openai", "--url", "http://localhost:8000").stderr
    (tmp_path / "tokenizer.json").write_text("{}")
    result = morph("openai", "--model", tmp_path, "--chat-template", tmp_path / "none.jinja")
    assert result.exit_code == 2 and "cannot be read" in result.stderr


@pytest.mark.parametrize(
    "seed, seeds", [(None, [None, None]), (-1, [-1, -1]), (7, [7, 8]), (2**63 - 1, [2**63 - 1, 0])]
)
def test_each_answer_has_a_seed_of_its_own_within_the_servers_range(seed: int | None, seeds: list[int | None]) -> None:
    request = TextRequest(model="morph", prompt="a", seed=seed, n=2)
    assert [sampling_of(request, choice).seed for choice in range(2)] == seeds
