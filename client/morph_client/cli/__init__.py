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
    simulate,
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
        rich_markup_mode=None,  # plain help: its boxes leave no room for words at 60 or 80 columns
        help="Serve, watch and measure MorphServe on Triton.",
        epilog="Begin with: morph demo. While a server runs: morph generate 'It was a dark night', morph top.",
    )
    app.command("serve", short_help="Run Triton with the model, until Ctrl-C.")(serve.serve)
    app.command("generate", short_help="Generate text from a prompt.")(generate.generate)
    app.command("chat", short_help="Talk with the model.")(chat.chat)
    app.command("openai", short_help="Offer OpenAI's HTTP interface for a running server.")(openai.openai)
    app.command("top", short_help="Watch precision, KV cache, queue and latency.")(top.top)
    app.command("mode", short_help="Show or change mode and cap of a running server.")(mode.mode)
    app.command("replay", short_help="Send a trace's requests when they are due.")(replay.replay)
    app.command("compare", short_help="Compare settings of the server on one trace.")(compare.compare)
    app.add_typer(traces.traces, name="traces", short_help="List and download public traces.")
    app.command("demo", short_help="Show what morphing does to a burst.")(demo.demo)
    app.command("quantize", short_help="Make an AWQ checkpoint for the W4 rung.")(quantize.quantize)
    app.command("pack", short_help="Prepare a model once, so that servers start fast.")(pack.pack)
    app.command("quality", short_help="Measure what each level costs in quality.")(quality.quality)
    app.command("costs", short_help="Show what steps and shifts cost on this machine.")(costs.costs)
    app.command("profile", short_help="Find the order in which layers go down.")(profile.profile)
    app.command("simulate", short_help="Simulate the engine and its controller over a trace.")(simulate.simulate)
    return app


def main() -> None:
    """Entry point."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    build_app()()
