"""The blocking client. Thread-safe: any number of threads may stream through one :class:`MorphClient`.

Each request is a gRPC stream of its own, because Triton cancels whole streams only. They share one HTTP/2
connection (or ``connections`` of them), so hundreds at a time cost no socket and no standing thread each, and no
idle stream is left open that would keep Triton from shutting down.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from morph_client import prometheus, wire
from morph_client.address import DEFAULT_URL, grpc_target, metrics_url_for
from morph_client.errors import BadInput, Cancelled, from_message, from_status
from morph_client.types import Chunk, Completion, CompletionBuilder, SamplingParams


class TokenStream:
    """The chunks of one answer. Iterate over it; close it (or leave its ``with`` block) to cancel on the server.

    Iterating raises the errors of :mod:`morph_client.errors`. After :meth:`close` the iteration just ends.
    """

    def __init__(self, call: Any, request_id: str, url: str) -> None:
        self.request_id = request_id
        self._call = call
        self._url = url
        self._reader = wire.ResponseReader()
        self._closed = False
        self._cancelled = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while self._is_open():
            try:
                response = next(self._call)
            except StopIteration:
                self._closed = True
                self._reader.check_complete()
                raise
            except grpc.RpcError as error:
                if not self._is_open():
                    break
                self._closed = True
                if self._cancelled:
                    raise Cancelled("the request was cancelled by this client") from None
                raise from_status(error.code().name, error.details(), self._url) from None
            if response.error_message:
                self._read_to_end()
                raise from_message(response.error_message)
            chunk = self._reader.read(response.infer_response)
            if chunk is not None:
                return chunk
        raise StopIteration

    def cancel(self) -> None:
        """Cancels on the server. May be called from any thread; a reader gets :class:`Cancelled`."""
        self._cancelled = True
        self._call.cancel()

    def close(self) -> None:
        """Ends the iteration, and cancels on the server if the answer is not complete. May be repeated."""
        if self._is_open() and self._reader.complete:
            self._read_to_end()
        self._closed = True
        self._call.cancel()

    def _read_to_end(self) -> None:
        """After the last response. It is not left to a cancellation: one at a stream's end can crash Triton 2.51."""
        self._closed = True
        with contextlib.suppress(grpc.RpcError):  # what was to be said has been said
            for _ in self._call:
                pass

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A stream that is dropped half read must not go on occupying the server.
        if self._is_open():
            self._closed = True
            self._call.cancel()

    def _is_open(self) -> bool:
        return not self._closed


class MorphClient:
    """A client of one server. Use it as a context manager, or call :meth:`close`.

    ``url`` is host:port of Triton's gRPC endpoint; ``metrics_url`` defaults to port 8002 of the same host;
    ``credentials`` (from ``grpc.ssl_channel_credentials``) turns TLS on; ``headers`` go with each request.
    Nothing is sent before the first call. Raises :class:`BadInput` for an address that cannot be one.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        metrics_url: str | None = None,
        model: str = "morph",
        connections: int = 1,
        credentials: grpc.ChannelCredentials | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if connections < 1:
            raise BadInput(f"connections must be at least 1, not {connections}")
        self.url = grpc_target(url)
        self.metrics_url = metrics_url or metrics_url_for(self.url)
        self.model = model
        self._metadata = tuple((headers or {}).items())
        options = wire.channel_options(own_connection=connections > 1)
        self._channels = [
            grpc.secure_channel(self.url, credentials, options)
            if credentials is not None
            else grpc.insecure_channel(self.url, options)
            for _ in range(connections)
        ]
        self._stubs = [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in self._channels]
        self._turn = itertools.cycle(self._stubs)

    def stream(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        stream: bool = True,
        priority: int = 0,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
        request_id: str | None = None,
        slo_class: str | None = None,
        details: bool = True,
    ) -> TokenStream:
        """Sends the prompt and returns its chunks as they come.

        ``stream=False`` asks for the answer in one chunk. ``priority`` 1 is the highest, 0 the server's default.
        ``timeout_s`` limits the wait in the server's queue (:class:`QueueTimeout`), ``deadline_s`` the whole
        request (:class:`DeadlineExceeded`). ``slo_class`` names the service class. ``details=False`` leaves
        out levels, rung shares and cached tokens, which a plain vLLM backend does not know.

        Raises :class:`InvalidRequest` for what this side can check; the rest is raised while iterating.
        """
        request = wire.build_request(
            prompt,
            model=self.model,
            sampling=sampling,
            stream=stream,
            priority=priority,
            timeout_s=timeout_s,
            request_id=request_id,
            slo_class=slo_class,
            details=details,
        )
        return self._send(request, deadline_s)

    def _send(self, request: wire.Request, deadline_s: float | None) -> TokenStream:
        stub = next(self._turn)
        try:
            call = stub.ModelStreamInfer(iter([request.to_message()]), timeout=deadline_s, metadata=self._metadata)
        except ValueError:
            raise Cancelled("this client is closed") from None
        return TokenStream(call, request.request_id, self.url)

    def generate(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        stream: bool = True,
        priority: int = 0,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
        request_id: str | None = None,
        slo_class: str | None = None,
        details: bool = True,
    ) -> Completion:
        """The whole answer; the parameters and errors are those of :meth:`stream`.

        With ``stream=False`` the server sends one response in all: cheaper, but the first token is not timed.
        """
        builder = CompletionBuilder()
        with self.stream(
            prompt,
            sampling=sampling,
            stream=stream,
            priority=priority,
            timeout_s=timeout_s,
            deadline_s=deadline_s,
            request_id=request_id,
            slo_class=slo_class,
            details=details,
        ) as chunks:
            for chunk in chunks:
                builder.add(chunk)
        return builder.build()

    def set_mode(
        self, mode: str = "", *, cap: float | None = None, admin_key: str, deadline_s: float | None = 60.0
    ) -> str:
        """Changes the controller's mode, the share of levels that it may use, or both; the server keeps serving.

        ``admin_key`` is the server's ``MORPH_ADMIN_KEY``. Returns the server's answer, one sentence. Raises
        :class:`InvalidRequest` for a wrong key, an unknown mode, or a cap that is not between 0 and 1.
        """
        request = wire.mode_request(self.model, mode, cap, admin_key)
        with self._send(request, deadline_s) as chunks:
            return "".join(chunk.text for chunk in chunks)

    def server_ready(self, timeout_s: float = 2.0) -> bool:
        """Whether the model takes requests. False as well when no server answers within ``timeout_s`` seconds."""
        message = service_pb2.ModelReadyRequest(name=self.model)
        try:
            return bool(next(self._turn).ModelReady(message, timeout=timeout_s, metadata=self._metadata).ready)
        except grpc.RpcError:
            return False

    def metrics(self, timeout_s: float = 5.0) -> prometheus.Metrics:
        """Scrapes the metrics endpoint. Raises :class:`ServerUnavailable` if it does not answer."""
        return prometheus.scrape(self.metrics_url, timeout_s)

    def close(self) -> None:
        """Closes the connections; requests in flight are cancelled on the server. May be repeated."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> MorphClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
