"""The asyncio client, on ``tritonclient``'s messages and stubs. For one event loop: the one it is first used in.

As in the blocking client, each request is a gRPC stream of its own on a shared HTTP/2 connection. The stubs are called
themselves, not through ``tritonclient.grpc.aio``: its iterators and result objects cost a tenth of the work per token.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from morph_client import prometheus, wire
from morph_client.address import DEFAULT_URL, grpc_target, metrics_url_for
from morph_client.errors import BadInput, Cancelled, from_message, from_status
from morph_client.types import Chunk, Completion, CompletionBuilder, SamplingParams


class AsyncTokenStream:
    """The chunks of one answer, for ``async for``. Close it (or leave its ``async with``) to cancel on the server.

    Iterating raises the errors of :mod:`morph_client.errors`. Cancelling the task that waits for a chunk cancels
    the request on the server too.
    """

    def __init__(self, call: Any, request_id: str, url: str) -> None:
        self.request_id = request_id
        self._call = call
        self._url = url
        self._reader = wire.ResponseReader()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._cancelled = False

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while self._is_open():
            try:
                response = await self._call.read()
            except asyncio.CancelledError:
                # gRPC raises this for a cancelled call as well as for a cancelled task; only the task's must go on.
                if not self._is_open():
                    break
                self._closed = True
                if self._cancelled:
                    raise Cancelled("the request was cancelled by this client") from None
                self._call.cancel()
                raise
            except grpc.RpcError as error:
                self._closed = True
                raise from_status(error.code().name, error.details(), self._url) from None
            if response is grpc.aio.EOF:
                self._closed = True
                self._reader.check_complete()
                break
            if response.error_message:
                await self._read_to_end()
                raise from_message(response.error_message)
            chunk = self._reader.read(response.infer_response)
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Cancels on the server; a task that waits for a chunk gets :class:`Cancelled`."""
        self._cancelled = True
        self._call.cancel()

    def close(self) -> None:
        """Ends the iteration, and cancels on the server unless it has been read to its end. May be repeated."""
        self._closed = True
        self._call.cancel()

    async def aclose(self) -> None:
        """:meth:`close`, but lets an answer that is complete end by itself."""
        if self._is_open() and self._reader.complete:
            await self._read_to_end()
        self.close()

    async def _read_to_end(self) -> None:
        """After the last response. It is not left to a cancellation: one at a stream's end can crash Triton 2.51."""
        self._closed = True
        with contextlib.suppress(grpc.RpcError):  # what was to be said has been said
            while await self._call.read() is not grpc.aio.EOF:
                pass

    async def __aenter__(self) -> AsyncTokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # A stream that is dropped half read must not go on occupying the server. The collector may run in any thread.
        if self._is_open() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)

    def _is_open(self) -> bool:
        return not self._closed


class AsyncMorphClient:
    """A client of one server; see :class:`~morph_client.MorphClient` for the parameters and errors."""

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
        self._connections = connections
        self._credentials = credentials
        self._channels: list[Any] = []
        self._turn: Iterator[Any] = iter(())

    def _stub(self) -> Any:
        # Made at first use, not in the constructor: a gRPC channel belongs to the loop that runs at its birth.
        if not self._channels:
            options = wire.channel_options(own_connection=self._connections > 1)
            self._channels = [
                grpc.aio.insecure_channel(self.url, options)
                if self._credentials is None
                else grpc.aio.secure_channel(self.url, self._credentials, options)
                for _ in range(self._connections)
            ]
            self._turn = itertools.cycle(service_pb2_grpc.GRPCInferenceServiceStub(c) for c in self._channels)
        return next(self._turn)

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
    ) -> AsyncTokenStream:
        """Sends the prompt and returns its chunks as they come; as :meth:`MorphClient.stream`.

        Call it where an event loop runs.
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
        call = self._stub().ModelStreamInfer(_once(request.to_message()), timeout=deadline_s, metadata=self._metadata)
        return AsyncTokenStream(call, request.request_id, self.url)

    async def generate(
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
        """The whole answer; as :meth:`MorphClient.generate`."""
        builder = CompletionBuilder()
        async with self.stream(
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
            async for chunk in chunks:
                builder.add(chunk)
        return builder.build()

    async def server_ready(self, timeout_s: float = 2.0) -> bool:
        """Whether the model takes requests. False as well when no server answers within ``timeout_s`` seconds."""
        request = service_pb2.ModelReadyRequest(name=self.model)
        try:
            return bool((await self._stub().ModelReady(request, timeout=timeout_s, metadata=self._metadata)).ready)
        except grpc.RpcError:
            return False

    async def metrics(self, timeout_s: float = 5.0) -> prometheus.Metrics:
        """Scrapes the metrics endpoint. Raises :class:`ServerUnavailable` if it does not answer."""
        return await asyncio.to_thread(prometheus.scrape, self.metrics_url, timeout_s)

    async def close(self) -> None:
        """Closes the connections; requests in flight are cancelled on the server. May be repeated."""
        channels, self._channels = self._channels, []
        for channel in channels:
            await channel.close()

    async def __aenter__(self) -> AsyncMorphClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _once(message: Any) -> AsyncIterator[Any]:
    yield message
