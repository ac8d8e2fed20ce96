"""``morph chat``: a conversation with a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from morph_client.chat import Conversation, PromptFormat, RawText
from morph_client.chat_template import ChatTemplate
from morph_client.cli.chat_session import ChatSession
from morph_client.cli.common import UrlOption
from morph_client.errors import BadInput
from morph_client.sync_client import MorphClient
from morph_client.types import SamplingParams


def chat(
    model: Annotated[
        Path | None,
        typer.Option(envvar="MORPH_MODEL", help="Folder of the model that is served: its chat template is used."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: the model continues the text. Needs no --model.")
    ] = False,
    system: Annotated[str, typer.Option(help="The system message; with --raw the text's beginning.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the server's default is 1.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Probability mass to sample from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Whether earlier turns are sent with each question.")
    ] = True,
    url: UrlOption = "",
) -> None:
    """Talk with the model. Ctrl-C breaks an answer off; at the prompt it ends the chat, as does Ctrl-D.

    The conversation is kept on this side. Standard input that is not a terminal is read line by line.
    """
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    form = RawText() if raw else _template(model)
    with MorphClient(url) as client:
        ChatSession(client, form, Conversation(system), sampling, max_tokens=max_tokens, history=history).run()


def _template(model: Path | None) -> PromptFormat:
    if model is None:
        raise BadInput(
            "--model (or MORPH_MODEL) must name the folder of the model that is served, for its chat template; "
            "--raw does without"
        )
    return ChatTemplate.from_folder(model)
