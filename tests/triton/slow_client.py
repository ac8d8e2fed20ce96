"""Clients that ask for much, read the first response, and then read nothing until they are told to."""

from __future__ import annotations

import json
import queue
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from triton_server import TritonServer

RECEIVE_BYTES = 4096
"""Of the SSE client's socket: little, so that soon the server cannot write any more."""
FLAGS = ("return_logprobs", "return_finish_reason", "return_num_output_tokens")


def stream_request(text: str, sampling: dict[str, Any], flags: Sequence[str] = ()) -> Any:
    """A streaming request, as it goes over the wire."""
    request = service_pb2.ModelInferRequest(model_name="morph")
    inputs = [("text_input", "BYTES", _bytes(text)), ("stream", "BOOL", b"\1")]
    inputs += [(name, "BOOL", b"\1") for name in flags]
    for name, kind, raw in [*inputs, ("sampling_parameters", "BYTES", _bytes(json.dumps(sampling)))]:
        request.inputs.add(name=name, datatype=kind, shape=[1])
        request.raw_input_contents.append(raw)
    return request


class SlowGrpc:
    """One gRPC stream. gRPC takes a message off the wire only when it is asked for the next."""

    def __init__(self, server: TritonServer) -> None:
        self._channel = grpc.insecure_channel(
            f"127.0.0.1:{server.grpc}", options=[("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
        )
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._call = stub.ModelStreamInfer(iter(self._requests.get, None))

    def ask(self, text: str, sampling: dict[str, Any]) -> None:
        """Send a request; nothing is read."""
        self._requests.put(stream_request(text, sampling, FLAGS))

    def read(self) -> dict[str, Any]:
        """The next response: tokens, and whether it says that it is the last."""
        answer = next(self._call)
        assert not answer.error_message, answer.error_message
        at = {output.name: place for place, output in enumerate(answer.infer_response.outputs)}
        raw = answer.infer_response.raw_output_contents
        tokens = int.from_bytes(raw[at["num_output_tokens"]], "little")
        return {"tokens": tokens, "last": b"None" not in raw[at["finish_reason"]]}

    def rest(self) -> Iterator[dict[str, Any]]:
        """What is left of the request."""
        while not (response := self.read())["last"]:
            yield response
        yield response

    def close(self) -> None:
        """Leave."""
        self._call.cancel()
        self._requests.put(None)
        self._channel.close()


class SlowSse:
    """One SSE stream on a socket of its own."""

    def __init__(self, server: TritonServer) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        self._socket.settimeout(60.0)
        self._socket.connect(("127.0.0.1", server.http))
        self._file = self._socket.makefile("rb")

    def ask(self, text: str, sampling: dict[str, Any]) -> None:
        """Send a request; nothing is read."""
        body = json.dumps(
            {
                "text_input": text,
                "stream": True,
                "sampling_parameters": json.dumps(sampling),
                **dict.fromkeys(FLAGS, True),
            }
        )
        head = f"POST /v2/models/morph/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(f"{head}{body}".encode())

    def read(self) -> dict[str, Any]:
        """The next response, as `SlowGrpc.read`."""
        for line in self._file:
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                return {"tokens": event["num_output_tokens"], "last": event["finish_reason"] != "None"}
        raise AssertionError("the connection has ended")

    rest = SlowGrpc.rest

    def close(self) -> None:
        """Leave."""
        self._file.close()
        self._socket.close()


def _bytes(text: str) -> bytes:
    return len(text.encode()).to_bytes(4, "little") + text.encode()
