"""What NVIDIA's own OpenAI frontend sends with `--backend vllm`, and what it reads back (docs/deploy.md).

The frontend itself comes in NVIDIA's containers alone. It takes these tensors for a request in vLLM's form: the text,
the two flags, each given parameter in one JSON text, and always the three flags for outputs.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from triton_server import TritonServer
from wire_client import GrpcStream, Response, tensor

pytestmark = pytest.mark.triton

# A chat request with the frontend's own defaults, and one with every field that it passes on.
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "n": 1,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "ignore_eos": False,
    "min_tokens": 0,
    "max_tokens": 16,
}
EVERYTHING: dict[str, Any] = {
    **DEFAULTS,
    **{"temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": -0.5, "ignore_eos": True},
    **{"seed": 3, "stop": ["zzz", "qqq"], "min_tokens": 2, "max_tokens": 20, "logprobs": 2},
}


def ask(server: TritonServer, parameters: dict[str, Any], stream: bool, logprobs: bool = False) -> list[Response]:
    inputs = [
        tensor("text_input", ["hello world"]),
        tensor("stream", [stream]),
        tensor("exclude_input_in_output", [True]),
        tensor("sampling_parameters", [json.dumps(parameters)]),
        tensor("return_logprobs", [logprobs]),
        tensor("return_num_input_tokens", [True]),
        tensor("return_num_output_tokens", [True]),
    ]
    responses = GrpcStream(server).ask_tensors(inputs).rest()
    assert not responses[-1].error, responses[-1].error
    return responses


@pytest.mark.parametrize("parameters", [DEFAULTS, EVERYTHING], ids=["defaults", "everything"])
def test_a_whole_answer_is_one_text_with_its_totals(server: TritonServer, parameters: dict[str, Any]) -> None:
    (response,) = ask(server, parameters, stream=False)
    assert len(response.outputs["text_output"]) == 1
    assert response.outputs["text_output"][0].startswith("hello world")
    assert response.outputs["num_output_tokens"] == [parameters["max_tokens"]]
    assert response.outputs["num_input_tokens"][0] > 0


def test_the_deltas_of_a_stream_add_up(server: TritonServer) -> None:
    (whole,) = ask(server, EVERYTHING, stream=False)
    parts = ask(server, EVERYTHING, stream=True)
    assert "".join(part.outputs["text_output"][0] for part in parts) == whole.outputs["text_output"][0]
    assert sum(part.outputs["num_output_tokens"][0] for part in parts) == 20
    assert {part.outputs["num_input_tokens"][0] for part in parts} == set(whole.outputs["num_input_tokens"])


def test_log_probabilities_are_one_entry_per_token(server: TritonServer) -> None:
    for part in ask(server, EVERYTHING, stream=True, logprobs=True):
        entries = json.loads(part.outputs["logprobs"][0])
        assert len(entries) == part.outputs["num_output_tokens"][0]
        for entry in entries:
            assert all({"logprob", "rank", "decoded_token"} <= set(value) for value in entry.values())
    (response,) = ask(server, DEFAULTS, stream=False, logprobs=True)
    assert response.outputs["logprobs"] == ["null"]


@pytest.mark.parametrize("stop", ["zzz", ["zzz"]])
def test_stop_is_a_text_or_a_list(server: TritonServer, stop: Any) -> None:
    (response,) = ask(server, {**DEFAULTS, "stop": stop}, stream=False)
    assert response.outputs["text_output"][0]
