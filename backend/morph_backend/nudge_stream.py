"""Puts expired requests into the model's own queue over gRPC; `morph_backend.nudge` says what for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

HIGHEST_PRIORITY = 1
EXPIRED_AT_ONCE_US = 1
METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
READER_ENDS_S = 5.0


class NudgeConnection:
    """A connection to the own server. It stays when its streams go: to connect takes longer than many nudges."""

    def __init__(self, address: str, model: str) -> None:
        """`address` is host:port; it is not connected to before the first stream."""
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._nudge = expired_request(model)

    def open(self, on_answer: Callable[[], None]) -> GrpcNudgeStream:
        """A stream; `on_answer` is called once for each nudge that was answered."""
        return GrpcNudgeStream(self._channel, self._nudge, on_answer)

    def close(self) -> None:
        """Close the connection, and the streams with it."""
        self._channel.close()


class GrpcNudgeStream:
    """Nudges are sent as the bytes that they are, and answers not decoded: a burst takes hundreds of them a second."""

    def __init__(self, channel: grpc.Channel, nudge: bytes, on_answer: Callable[[], None]) -> None:
        self._nudge = nudge
        self._on_answer = on_answer
        self._broken = ""
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()
        self._call: Any = channel.stream_stream(METHOD)(self._requests())
        self._reader = threading.Thread(target=self._read, name="queue-nudge-answers", daemon=True)
        self._reader.start()

    def send(self) -> None:
        """Put one expired request into the queue. Raises OSError when the stream has ended."""
        if self._broken:
            raise OSError(self._broken)
        self._waiting.put(self._nudge)

    def close(self) -> None:
        """End the stream; no answer is reported after it.

        The server ends it when it has answered everything. Cancelling is the last resort: after streams were cancelled,
        tritonserver (24.10) has crashed.
        """
        self._waiting.put(None)
        self._reader.join(READER_ENDS_S)
        if self._reader.is_alive():
            self._call.cancel()

    def _requests(self) -> Iterator[bytes]:
        while (request := self._waiting.get()) is not None:
            yield request

    def _read(self) -> None:
        try:
            for _ in self._call:
                self._on_answer()
            self._broken = "the server has closed the stream"
        except grpc.RpcError as error:
            self._broken = str(error) or "the stream has broken"


def expired_request(model: str) -> bytes:
    """A request of the highest priority whose timeout is over when it comes, as it goes over the wire."""
    request = service_pb2.ModelInferRequest(model_name=model)
    # Empty, so that even without a queue timeout it would be refused, not served.
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(bytes(4))  # the length of the one string
    request.parameters["priority"].uint64_param = HIGHEST_PRIORITY
    request.parameters["timeout"].int64_param = EXPIRED_AT_ONCE_US
    return bytes(request.SerializeToString())
