"""Small clients for tests: HTTP generate, SSE, and a gRPC stream per request."""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from triton_server import TritonServer


def post(server: TritonServer, body: dict[str, Any] | bytes, path: str = "generate") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=PATIENCE_S)
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", f"/v2/models/morph/{path}", raw)
        answer = connection.getresponse()
        text = answer.read().decode()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text
    finally:
        connection.close()


def generate(server: TritonServer, text: str, **keys: Any) -> dict[str, Any]:
    status, body = post(server, {"text_input": text, "exclude_input_in_output": True, **keys})
    assert status == 200, body
    return body


def open_sse(
    server: TritonServer, text: str, **keys: Any
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=PATIENCE_S)
    body = json.dumps({"text_input": text, "stream": True, **keys}).encode()
    connection.request("POST", "/v2/models/morph/generate_stream", body)
    return connection, connection.getresponse()


def sse_events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def sse(server: TritonServer, text: str, **keys: Any) -> list[dict[str, Any]]:
    connection, answer = open_sse(server, text, **keys)
    try:
        return list(sse_events(answer))
    finally:
        connection.close()


PATIENCE_S = 60.0
"""For what takes well under a second here: a busy machine is no defect."""


@dataclass
class Response:
    at_s: float
    outputs: dict[str, Any]
    final: bool
    error: str = ""
    status: str = ""


@dataclass
class GrpcStream:
    """One gRPC stream with one request on it."""

    server: TritonServer
    responses: list[Response] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = grpcclient.InferenceServerClient(f"127.0.0.1:{self.server.grpc}")
        self._queue: queue.Queue[Response] = queue.Queue()
        self.ended = threading.Event()
        self.client.start_stream(self._on_response)
        self.started_s = time.monotonic()

    def ask(self, text: str, sampling: dict[str, Any] | None = None, stream: bool = True, **keys: Any) -> GrpcStream:
        flags = {k: v for k, v in keys.items() if k.startswith(("return_", "exclude_"))}
        others = {k: v for k, v in keys.items() if k not in flags}
        inputs = [tensor("text_input", [text]), tensor("stream", [stream])]
        inputs += [tensor(name, [value]) for name, value in flags.items()]
        if sampling is not None:
            inputs.append(tensor("sampling_parameters", [json.dumps(sampling)]))
        return self.ask_tensors(inputs, **others)

    def ask_tensors(self, inputs: list[Any], **others: Any) -> GrpcStream:
        self.started_s = time.monotonic()
        self.client.async_stream_infer("morph", inputs, enable_empty_final_response=True, **others)
        return self

    def _on_response(self, result: Any, error: InferenceServerException | None) -> None:
        response = self._response(result, error)
        self._queue.put(response)
        if response.final:
            self.ended.set()

    def _response(self, result: Any, error: InferenceServerException | None) -> Response:
        now = time.monotonic() - self.started_s
        if error is not None:
            return Response(now, {}, True, error.message(), error.status() or "")
        answer = result.get_response()
        final = answer.parameters["triton_final_response"].bool_param
        outputs = {}
        for output in answer.outputs:
            array = result.as_numpy(output.name)
            outputs[output.name] = [v.decode() if isinstance(v, bytes) else v for v in np.atleast_1d(array).tolist()]
        return Response(now, outputs, final)

    def next(self, timeout_s: float = PATIENCE_S) -> Response:
        response = self._queue.get(timeout=timeout_s)
        self.responses.append(response)
        return response

    def rest(self, timeout_s: float = PATIENCE_S) -> list[Response]:
        """All responses up to the final one."""
        while not self.responses or not self.responses[-1].final:
            self.next(timeout_s)
        self.close()
        return self.responses

    def cancel(self) -> None:
        self.client.stop_stream(cancel_requests=True)

    def close(self) -> None:
        self.client.stop_stream()
        self.client.close()


def grpc_status(server: TritonServer, text: str) -> tuple[str, str]:
    """The gRPC status of a refused request, and its words.

    `triton_grpc_error` makes Triton use real ones, and 2.51 crash after some of them: not for a server that is needed.
    """
    request = service_pb2.ModelInferRequest(model_name="morph")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(text.encode()).to_bytes(4, "little") + text.encode())
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer(iter([request]), metadata=(("triton_grpc_error", "true"),))
        try:
            list(call)
        except grpc.RpcError:
            return call.code().name, call.details()
    return "OK", ""


def tensor(name: str, values: list[Any]) -> Any:
    if isinstance(values[0], (bytes, str)):
        array, kind = np.array([v if isinstance(v, bytes) else v.encode() for v in values], dtype=np.object_), "BYTES"
    elif isinstance(values[0], bool):
        array, kind = np.array(values), "BOOL"
    else:
        array, kind = np.array(values, dtype=np.int32), "INT32"
    made = grpcclient.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def text_of(responses: list[Response]) -> str:
    return "".join(r.outputs.get("text_output", [""])[0] for r in responses)


def until(condition: Any, timeout_s: float = PATIENCE_S, what: str = "the condition") -> float:
    """Wait for a condition; the seconds it took."""
    began = time.monotonic()
    while time.monotonic() - began < timeout_s:
        if condition():
            return time.monotonic() - began
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come true in {timeout_s} s")


def pending(server: TritonServer) -> float:
    """Requests in Triton's queue."""
    return server.metric("nv_inference_pending_request_count", model="morph")


def fill(server: TritonServer) -> list[GrpcStream]:
    """Occupy the engine (1 running), its line (2) and execute() (1) of the server `narrow`.

    To be called while the server is held; the four end soon after that.
    """
    streams = [GrpcStream(server).ask("hello world", {"max_tokens": 20})]
    streams[0].next()
    streams += [GrpcStream(server).ask("in the line", {"max_tokens": 1}) for _ in range(3)]

    def all_in() -> bool:  # on its way into the line a request is held for a moment, too
        held, waiting = server.metric("morph_execute_waiting"), server.metric("vllm:num_requests_waiting")
        return held == 1 and waiting == 3 and pending(server) == 0

    until(all_in, what="two requests in the line and one held in execute()")
    return streams
