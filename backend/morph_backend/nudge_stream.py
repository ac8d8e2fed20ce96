"""A gRPC stream that puts expired requests into the model's own queue; `morph_backend.nudge` says what for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

HIGHEST_PRIORITY = 1
EXPIRED_AT_ONCE_US = 1
METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
READER_ENDS_S = 5.0


class GrpcNudgeStream:
    """The nudge is made once, as bytes, and its answers are not decoded: a burst sends hundreds of them a second."""

    def __init__(self, address: str, model: str, on_answer: Callable[[], None]) -> None:
        """Open the stream to `address` (host:port); `on_answer` is called once for each nudge that was answered."""
        # Imported here: the first nudge pays for it, not the start of the model.
        import grpc
        from tritonclient.grpc import service_pb2

        self._nudge = expired_request(service_pb2, model)
        self._on_answer = on_answer
        self._broken = ""
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._call = self._channel.stream_stream(METHOD)(self._requests())
        self._rpc_error = grpc.RpcError
        self._reader = threading.Thread(target=self._read, name="queue-nudge-answers", daemon=True)
        self._reader.start()

    def send(self) -> None:
        """Put one expired request into the queue. Raises OSError when the stream has ended."""
        if self._broken:
            raise OSError(self._broken)
        self._waiting.put(self._nudge)

    def close(self) -> None:
        """Close the stream."""
        self._waiting.put(None)
        self._call.cancel()
        self._channel.close()
        self._reader.join(READER_ENDS_S)

    def _requests(self) -> Iterator[bytes]:
        while (request := self._waiting.get()) is not None:
            yield request

    def _read(self) -> None:
        try:
            for _ in self._call:
                self._on_answer()
            self._broken = "the server has closed the stream"
        except self._rpc_error as error:
            self._broken = str(error.details() or error.code())


def expired_request(messages: Any, model: str) -> bytes:
    """A request of the highest priority whose timeout is over when it comes. `messages` is Triton's `service_pb2`."""
    request = messages.ModelInferRequest(model_name=model)
    # Empty, so that even without a queue timeout it would be refused, not served.
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(bytes(4))  # the length of the one string
    request.parameters["priority"].uint64_param = HIGHEST_PRIORITY
    request.parameters["timeout"].int64_param = EXPIRED_AT_ONCE_US
    return bytes(request.SerializeToString())
