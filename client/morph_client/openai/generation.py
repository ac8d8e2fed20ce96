"""All answers to one request: one stream each on the wire, read side by side, ended together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from morph_client.aio_client import AsyncMorphClient, AsyncTokenStream
from morph_client.openai.answers import Choice
from morph_client.types import Chunk, SamplingParams

_AHEAD = 16
"""Chunks that may lie here unread; beyond that the streams wait for the slower reader."""


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted."""

    prompt_number: int
    prompt: str
    sampling: SamplingParams


@dataclass(frozen=True)
class Service:
    """How the answers travel."""

    stream: bool
    priority: int
    slo_class: str | None


class Generation:
    """All answers to one request.

    Several answers are several requests to the server: each waits in Triton's queue by itself, and a prompt that
    they share is computed once where the prefix cache has it by then. The first error ends the iteration; who
    iterates must close it then, which cancels the others.
    """

    def __init__(self, client: AsyncMorphClient, asks: Sequence[Ask], service: Service) -> None:
        self.choices = [Choice(index, ask.prompt_number) for index, ask in enumerate(asks)]
        self._streams = [
            client.stream(
                ask.prompt,
                sampling=ask.sampling,
                stream=service.stream,
                priority=service.priority,
                slo_class=service.slo_class,
                details=False,
            )
            for ask in asks
        ]

    def close(self) -> None:
        """Cancels what is not finished. May be repeated."""
        for stream in self._streams:
            stream.close()

    async def pairs(self) -> AsyncGenerator[tuple[Choice, Chunk], None]:
        """Pairs of an answer and a chunk, as the chunks of all answers come; the answer already holds the chunk."""
        if len(self._streams) == 1:
            async for chunk in self._streams[0]:
                yield self._book(0, chunk)
            return
        async with contextlib.aclosing(_side_by_side(self._streams)) as chunks:
            async for index, chunk in chunks:
                yield self._book(index, chunk)

    def _book(self, index: int, chunk: Chunk) -> tuple[Choice, Chunk]:
        choice = self.choices[index]
        choice.text += chunk.text
        choice.tokens += chunk.tokens
        choice.logprobs.extend(chunk.logprobs)
        choice.finish_reason = chunk.finish_reason
        choice.prompt_tokens = chunk.num_input_tokens or choice.prompt_tokens
        return choice, chunk


async def _side_by_side(streams: Sequence[AsyncTokenStream]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of several streams in the order of their arrival, each with its stream's number."""
    arrived: asyncio.Queue[tuple[int, Chunk] | BaseException | None] = asyncio.Queue(_AHEAD)

    async def pump(index: int, stream: AsyncTokenStream) -> None:
        try:
            async for chunk in stream:
                await arrived.put((index, chunk))
        except Exception as error:  # noqa: BLE001 - raised again below, in the reader's task
            await arrived.put(error)
        else:
            await arrived.put(None)

    pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        open_streams = len(streams)
        while open_streams:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
