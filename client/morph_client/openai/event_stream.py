"""The answer that comes as server-sent events. One hop from a chunk on the wire to the bytes of its event."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from morph_client.errors import MorphError
from morph_client.openai.answers import Answer, Choice
from morph_client.openai.generation import Generation
from morph_client.openai.problems import from_server
from morph_client.types import Chunk

Pair = tuple[Choice, Chunk]
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """What the events look like.

    Attributes:
        answer: makes their bodies.
        with_usage: whether the last one before the end gives the usage.
        prompt_field: what the prompt is called in errors.
    """

    answer: Answer
    with_usage: bool
    prompt_field: str


class EventStream(Response):
    """The events of a generation that has begun. However it ends, the client leaving included, what is not finished
    is cancelled; an error of the server is the last event."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, first: Pair, rest: AsyncGenerator[Pair, None], form: Form) -> None:
        """``first`` is what ``rest``, the iteration over ``generation``, has given already."""
        super().__init__()
        del self.headers["content-length"]
        self._generation = generation
        self._first = first
        self._rest = rest
        self._form = form
        self._begun: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(self._cancel_when_left(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with contextlib.aclosing(self._rest) as rest:
                await self._events(rest, send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()
            self._generation.close()

    async def _events(self, rest: AsyncGenerator[Pair, None], send: Send) -> None:
        await send(_part(self._news(*self._first)))
        try:
            async for choice, chunk in rest:
                await send(_part(self._news(choice, chunk)))
        except MorphError as error:
            await send(_part(_event(from_server(error, self._form.prompt_field).text())))
            return
        last = _event(self._form.answer.last_event(self._generation.choices)) if self._form.with_usage else b""
        await send(_part(last + _DONE))

    def _news(self, choice: Choice, chunk: Chunk) -> bytes:
        first = choice.index not in self._begun
        self._begun.add(choice.index)
        return _event(self._form.answer.event(choice, chunk.text, chunk.logprobs, first, self._form.with_usage))

    async def _cancel_when_left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.close()


def _event(body: str) -> bytes:
    return b"data: %b\n\n" % body.encode("utf-8", "replace")


def _part(body: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": True}
