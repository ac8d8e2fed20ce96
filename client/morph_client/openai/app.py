"""The HTTP application: routes, and the way of one request through them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from morph_client.aio_client import AsyncMorphClient
from morph_client.chat_template import ChatTemplate
from morph_client.errors import BadInput, MorphError
from morph_client.openai.answers import Answer, ChatAnswer, TextAnswer
from morph_client.openai.generation import Ask, Generation, Service
from morph_client.openai.problems import ApiError, from_server, from_shape, no_such_model
from morph_client.openai.sampling import sampling_of
from morph_client.openai.shapes import MAX_CHOICES, ChatRequest, TextRequest

NO_TEMPLATE = "This server has no chat template: use /v1/completions, or start it with --model and a folder with one."
CLIENT_GONE = 499
"""The status in the access log where nobody is left to read an answer."""
_DONE = b"data: [DONE]\n\n"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Served:
    """What this application offers.

    Attributes:
        name: the model's name in requests and answers.
        template: its chat template; ``None``: completions only.
    """

    name: str
    template: ChatTemplate | None = None


class _ClientGone(Exception):
    """The client closed its connection before the answer began."""


def build_app(client: AsyncMorphClient, served: Served) -> FastAPI:
    """The application; it closes ``client`` at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(title="MorphServe on Triton", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_bad_shape)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    desk = _Desk(client, served)

    @app.get("/health")
    async def health() -> Response:
        """Whether the model takes requests."""
        ready = await client.server_ready()
        return Response(status_code=200 if ready else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [desk.card]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The model, if that is its name."""
        desk.check_model(name)
        return JSONResponse(desk.card)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """A conversation, by the model's chat template."""
        desk.check_model(body.model)
        prompt = desk.chat_prompt(body)
        top = (body.top_logprobs or 0) if body.logprobs else None
        return await desk.answer(request, body, [prompt], ChatAnswer(served.name, top), "messages")

    @app.post("/v1/completions")
    async def completions(body: TextRequest, request: Request) -> Response:
        """One or several texts to go on with."""
        desk.check_model(body.model)
        if body.best_of not in (None, 1, body.n):
            raise ApiError(400, "best_of: only the value of n is served.", param="best_of")
        echo = body.prompts if body.echo else None
        if echo and body.logprobs is not None:
            raise ApiError(400, "echo: log probabilities of the prompt are not served.", param="echo")
        return await desk.answer(request, body, body.prompts, TextAnswer(served.name, body.logprobs, echo), "prompt")

    return app


class _Desk:
    """Answers requests."""

    def __init__(self, client: AsyncMorphClient, served: Served) -> None:
        self._client = client
        self._served = served
        context = None if served.template is None else served.template.context
        self.card = {
            "id": served.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "morphserve",
            "max_model_len": context,
        }

    def check_model(self, name: str) -> None:
        """Raises :class:`ApiError` (404) for another name than the served one."""
        if name != self._served.name:
            raise no_such_model(name, self._served.name)

    def chat_prompt(self, body: ChatRequest) -> str:
        """The conversation as the model's template has it."""
        if self._served.template is None:
            raise ApiError(400, NO_TEMPLATE, param="messages", code="no_chat_template")
        try:
            messages = [message.plain() for message in body.messages]
            return self._served.template.render(messages, body.chat_template_kwargs or {})
        except BadInput as error:
            raise from_server(error, "messages") from None

    async def answer(
        self,
        request: Request,
        body: ChatRequest | TextRequest,
        prompts: Sequence[str],
        form: Answer,
        prompt_field: str,
    ) -> Response:
        """The whole answer, or a stream once its first text is there: until then an error still has its status."""
        count = body.n or 1
        if len(prompts) * count > MAX_CHOICES:
            raise ApiError(400, f"n: {len(prompts)} prompts times {count} are over {MAX_CHOICES} answers.", param="n")
        asks = [Ask(i, prompt, sampling_of(body, k)) for i, prompt in enumerate(prompts) for k in range(count)]
        service = Service(bool(body.stream), body.priority or 0, body.slo_class)
        try:
            generation = Generation(self._client, asks, service)
            try:
                if body.stream:
                    events = _events(generation, form, bool(body.stream_options and body.stream_options.include_usage))
                    first = await _unless_gone(request, anext(events))
                    return _EventStream(_joined(first, events, prompt_field), generation)
                await _unless_gone(request, _to_the_end(generation))
            except BaseException:
                generation.close()
                raise
        except MorphError as error:
            raise from_server(error, prompt_field) from None
        except _ClientGone:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(form.whole(generation.choices))


class _EventStream(StreamingResponse):
    """Server-sent events. However it ends, the client leaving included, what is not finished is cancelled."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], generation: Generation) -> None:
        super().__init__(events)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _to_the_end(generation: Generation) -> None:
    async for _ in generation:
        pass


async def _events(generation: Generation, form: Answer, with_usage: bool) -> AsyncIterator[bytes]:
    begun: set[int] = set()
    async for choice, chunk in generation:
        yield _event(form.event(choice, chunk.text, chunk.logprobs, choice.index not in begun, with_usage))
        begun.add(choice.index)
    if with_usage:
        yield _event(form.last_event(generation.choices))
    yield _DONE


async def _joined(first: bytes, rest: AsyncIterator[bytes], prompt_field: str) -> AsyncIterator[bytes]:
    """The events of a stream that has begun; an error is its last one."""
    yield first
    try:
        async for event in rest:
            yield event
    except MorphError as error:
        yield _event(from_server(error, prompt_field).body())


async def _unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """The result of ``work``, which is cancelled if the client closes its connection first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _ClientGone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _on_bad_shape(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _on_api_error(request, from_shape(error.errors()))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = ApiError(error.status_code, str(error.detail), code=None, headers=error.headers or {})
    return await _on_api_error(request, problem)


async def _on_fault(request: Request, error: Exception) -> Response:
    logging.getLogger(__name__).error("a request failed: %r", error)
    return await _on_api_error(request, ApiError(500, "The server failed; its log says why.", "server_error"))
