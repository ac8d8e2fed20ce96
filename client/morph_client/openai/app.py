"""The HTTP application: routes, and the way of one request through them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from morph_client.aio_client import AsyncMorphClient
from morph_client.chat_template import ChatTemplate
from morph_client.errors import BadInput, MorphError
from morph_client.openai.answers import Answer, ChatAnswer, TextAnswer
from morph_client.openai.event_stream import EventStream, Form
from morph_client.openai.generation import Ask, Generation, Service
from morph_client.openai.problems import ApiError, from_server, from_shape, no_such_model
from morph_client.openai.sampling import sampling_of
from morph_client.openai.shapes import MAX_CHOICES, ChatRequest, TextRequest

NO_TEMPLATE = "This server has no chat template: use /v1/completions, or start it with --model and a folder with one."
CLIENT_GONE = 499
"""The status in the access log where nobody is left to read an answer."""
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
                    with_usage = bool(body.stream_options and body.stream_options.include_usage)
                    pairs = generation.pairs()
                    first = await _unless_gone(request, anext(pairs))
                    return EventStream(generation, first, pairs, Form(form, with_usage, prompt_field))
                await _unless_gone(request, _to_the_end(generation))
            except BaseException:
                generation.close()
                raise
        except MorphError as error:
            raise from_server(error, prompt_field) from None
        except _ClientGone:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(form.whole(generation.choices))


async def _to_the_end(generation: Generation) -> None:
    async for _ in generation.pairs():
        pass


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
