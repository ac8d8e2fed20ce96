"""The ``morph`` command. What a user can mend is told in one sentence, with an exit status and no traceback."""

from __future__ import annotations

import io
import sys

import typer

from morph_client.cli import (
    chat,
    compare,
    costs,
    demo,
    generate,
    mode,
    openai,
    pack,
    profile,
    quality,
    quantize,
    replay,
    serve,
    top,
    traces,
)
from morph_client.cli.common import OneSentenceGroup


def build_app() -> typer.Typer:
    """The command with its subcommands."""
    app = typer.Typer(
        name="morph",
        cls=OneSentenceGroup,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Serve, watch and measure MorphServe on Triton.",
    )
    app.command("serve")(serve.serve)
    app.command("generate")(generate.generate)
    app.command("chat")(chat.chat)
    app.command("openai")(openai.openai)
    app.command("top")(top.top)
    app.command("mode")(mode.mode)
    app.command("replay")(replay.replay)
    app.command("compare")(compare.compare)
    app.add_typer(traces.traces, name="traces")
    app.command("demo")(demo.demo)
    app.command("quantize")(quantize.quantize)
    app.command("pack")(pack.pack)
    app.command("quality")(quality.quality)
    app.command("costs")(costs.costs)
    app.command("profile")(profile.profile)
    return app


def main() -> None:
    """Entry point."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    build_app()()
