"""In the place of Triton's vLLM backend: its repository as it is, and the behaviours that its own CI checks.

What is checked elsewhere: texts, echo and deltas (test_generate), additional outputs (test_generate and
test_real_engine), cancellation (test_cancellation), exact metrics (test_metrics), an engine that dies
(test_shutdown, test_real_engine).
"""

from __future__ import annotations

import http.client
import json
import shutil
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from triton_server import TritonServer, fake_repository
from wire_client import GrpcStream, generate, until

pytestmark = pytest.mark.triton

KEY = "a-key-of-the-administrator"
# As in the sample repository of Triton's vLLM backend, but for the backend's name; with that backend's own parameters.
CONFIG = """
backend: "python"
instance_group [ { count: 1 kind: KIND_MODEL } ]
parameters { key: "REPORT_CUSTOM_METRICS" value: { string_value: "true" } }
parameters { key: "ENABLE_VLLM_HEALTH_CHECK" value: { string_value: "true" } }
"""
ADD_SUB = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            a, b = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("INPUT0", "INPUT1"))
            tensors = [pb_utils.Tensor("OUTPUT0", a + b), pb_utils.Tensor("OUTPUT1", a - b)]
            answers.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return answers
"""
ADD_SUB_CONFIG = """
backend: "python"
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 2 ] }, { name: "INPUT1" data_type: TYPE_FP32 dims: [ 2 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 2 ] }, { name: "OUTPUT1" data_type: TYPE_FP32 dims: [ 2 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""


def write(folder: Path, config: str, model: str = "", model_json: Any = None) -> None:
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config)
    if model:
        (folder / "1" / "model.py").write_text(model)
    if model_json is not None:
        (folder / "1" / "model.json").write_text(json.dumps(model_json))


@pytest.fixture(scope="module")
def vllms(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[TritonServer]:
    """A repository of Triton's vLLM backend under explicit model control, without metrics."""
    folder = tmp_path_factory.mktemp("vllm")
    repository = fake_repository(folder / "repository")
    arguments = {"model": str(tiny_model), "disable_log_requests": True, "gpu_memory_utilization": 0.5}
    write(repository / "morph", CONFIG, model_json=arguments)
    for name in ("second", "bad"):
        shutil.copytree(repository / "morph", repository / name)
    write(repository / "bad", CONFIG, model_json={**arguments, "gpu_memory_utilisation": 0.5})
    write(repository / "add_sub", ADD_SUB_CONFIG, ADD_SUB)
    controls = "--model-control-mode=explicit --load-model=morph --allow-metrics=false"
    server = TritonServer(
        folder,
        {
            "MORPH_MODEL_REPOSITORY": str(repository),
            "MORPH_TRITON_ARGS": f"{controls} --backend-config=python,default-max-batch-size=8",
            "MORPH_LOG_LEVEL": "INFO",
            "MORPH_LOG_VERBOSE": "1",
            "FAKE_STEP_MS": "5",
            "MORPH_ADMIN_KEY": KEY,
        },
    )
    try:
        yield server.wait_ready()
    finally:
        assert server.stop() == 0, server.output()


def call(server: TritonServer, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=60)
    try:
        connection.request(method, f"/v2/{path}", None if body is None else json.dumps(body), {"admin-key": KEY})
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if text else None
    finally:
        connection.close()


def load(server: TritonServer, name: str, action: str = "load") -> tuple[int, Any]:
    return call(server, "POST", f"repository/models/{name}/{action}", {})


def test_the_tensors_are_completed_and_the_model_is_decoupled(vllms: TritonServer) -> None:
    status, config = call(vllms, "GET", "models/morph/config")
    assert status == 200 and config["max_batch_size"] == 0 and config["model_transaction_policy"]["decoupled"]
    required = [item["name"] for item in config["input"] if not item["optional"]]
    assert required == ["text_input"] and len(config["input"]) > 12 and len(config["output"]) > 6
    assert generate(vllms, "hello world", max_tokens="5", return_num_output_tokens=True)["num_output_tokens"] == 5


def test_another_model_beside_it(vllms: TritonServer) -> None:
    assert load(vllms, "add_sub")[0] == 200
    values = [{"name": f"INPUT{i}", "datatype": "FP32", "shape": [2], "data": [5.0, i]} for i in (0, 1)]
    status, answer = call(vllms, "POST", "models/add_sub/infer", {"inputs": values})
    assert status == 200 and answer["outputs"][0]["data"] == [10.0, 1.0]


def test_a_second_model_is_loaded_served_and_unloaded(vllms: TritonServer) -> None:
    assert load(vllms, "second")[0] == 200
    until(lambda: call(vllms, "GET", "models/second/ready")[0] == 200, what="the second model")
    status, answer = call(vllms, "POST", "models/second/generate", {"text_input": "hello world"})
    assert status == 200 and answer["text_output"].startswith("hello world")
    assert load(vllms, "second", "unload")[0] == 200
    until(lambda: call(vllms, "GET", "models/second/ready")[0] != 200, what="the unloading")
    status, answer = call(vllms, "POST", "models/second/generate", {"text_input": "hello world"})
    assert status in (400, 404) and "Request for unknown model: 'second' has no available versions" in answer["error"]
    assert generate(vllms, "hello world")["text_output"], "the first model goes on"


def test_a_bad_argument_and_a_bad_name_fail_the_load(vllms: TritonServer) -> None:
    status, answer = load(vllms, "bad")
    assert status == 400 and "'gpu_memory_utilisation' is an engine argument that MorphServe" in str(answer)
    assert load(vllms, "no_such_model")[0] >= 400
    assert generate(vllms, "hello world")["text_output"], "the first model goes on, and the server with it"


def test_a_cancelled_stream_leaves_the_log_lines_that_people_look_for(vllms: TritonServer) -> None:
    stream = GrpcStream(vllms).ask("hello world", {"max_tokens": "490"})
    stream.next()
    stream.cancel()
    until(lambda: "[vllm] Successfully cancelled the request" in vllms.output(), what="the log line")
    assert "[vllm] Cancelling the request" in vllms.output()


def test_two_prompts_stream_at_once(vllms: TritonServer) -> None:
    streams = [GrpcStream(vllms).ask(text, {"max_tokens": 16}) for text in ("hello world", "the quick brown fox")]
    texts = ["".join(r.outputs["text_output"][0] for r in stream.rest()) for stream in streams]
    assert texts[0].startswith("hello") and texts[1].startswith("the quick")


@pytest.mark.parametrize(
    "sampling", [{"max_tokens": "8", "min_tokens": "8"}, {"max_tokens": 8, "ignore_eos": True}],
    ids=["genai-perf", "perf_analyzer"],
)  # fmt: skip
def test_what_load_generators_send_and_read(vllms: TritonServer, sampling: dict[str, Any]) -> None:
    """They ask for Triton's empty final response, and read `text_output` of every response that is not it."""
    answers = GrpcStream(vllms).ask("hello world", sampling, exclude_input_in_output=True).rest()
    texts = [answer.outputs["text_output"][0] for answer in answers if answer.outputs]
    assert texts and texts[0], "an empty first response would count as the first token"
    assert [answer.final for answer in answers] == [False] * (len(answers) - 1) + [True]
    whole = generate(vllms, "hello world", sampling_parameters=json.dumps(sampling), return_num_output_tokens=True)
    assert whole["num_output_tokens"] == 8 and "".join(texts) == whole["text_output"]


def test_a_server_without_metrics_serves(vllms: TritonServer) -> None:
    with pytest.raises(urllib.error.URLError):
        vllms.metrics_text()
    assert generate(vllms, "hello world", max_tokens=4)["text_output"].startswith("hello")
