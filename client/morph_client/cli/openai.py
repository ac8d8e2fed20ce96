"""``morph openai``: OpenAI's HTTP interface in front of a running server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from morph_client.address import grpc_target
from morph_client.aio_client import AsyncMorphClient
from morph_client.chat_template import ChatTemplate, NoChatTemplate
from morph_client.cli.common import UrlOption
from morph_client.errors import BadInput, MissingDependency


def openai(
    model: Annotated[
        Path | None,
        typer.Option(envvar="MORPH_MODEL", help="Folder of the model that is served: its chat template is used."),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(envvar="MORPH_CHAT_TEMPLATE", help="A Jinja file to use instead of the model's own template."),
    ] = None,
    served_name: Annotated[
        str,
        typer.Option(
            "--served-model-name", envvar="MORPH_SERVED_MODEL_NAME", help="The model's name in requests and answers."
        ),
    ] = "morph",
    host: Annotated[str, typer.Option(envvar="MORPH_OPENAI_HOST", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="MORPH_OPENAI_PORT", min=1, max=65535, help="The port.")] = 9000,
    workers: Annotated[
        int | None,
        typer.Option(
            envvar="MORPH_OPENAI_WORKERS",
            min=1,
            max=64,
            help="Processes that answer.",
            show_default="one for every four processors, at most 4",
        ),
    ] = None,
    connections: Annotated[int, typer.Option(min=1, max=64, help="gRPC connections of each to the server.")] = 4,
    drain_seconds: Annotated[
        int, typer.Option(envvar="MORPH_DRAIN_S", min=0, max=3600, help="Time for open answers to end at the end.")
    ] = 30,
    url: UrlOption = "",
) -> None:
    """Serve /v1/chat/completions, /v1/completions and /v1/models, until Ctrl-C. Without --model: no chat."""
    try:
        from morph_client.openai.app import Served, build_app
        from morph_client.openai.server import listen, serve
        from morph_client.openai.workers import default_count
    except ImportError as error:
        missing = (error.name or "fastapi").partition(".")[0]
        raise MissingDependency(
            f"this needs {missing}, which is not installed: pip install 'morphserve[openai-server]'"
        ) from None
    template = _template(model, chat_template)
    listening = listen(host, port)
    client = AsyncMorphClient(grpc_target(url), connections=connections)
    chat = "with chat" if template is not None else "without chat: no chat template was found"
    print(f"http://{host}:{port}/v1 for the model '{served_name}' at {client.url}, {chat}", file=sys.stderr, flush=True)
    serve(build_app(client, Served(served_name, template)), listening, drain_seconds, workers or default_count())


def _template(model: Path | None, chat_template: Path | None) -> ChatTemplate | None:
    if model is None:
        if chat_template is not None:
            raise BadInput("--chat-template needs --model too: the model's tokenizer renders it")
        return None
    text = None
    if chat_template is not None:
        try:
            text = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the chat template {chat_template} cannot be read: {error}") from None
    try:
        return ChatTemplate.from_folder(model, text)
    except NoChatTemplate:
        return None
