"""What the subcommands share: the two consoles, the address options, and how errors are told."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from morph_client.address import DEFAULT_URL, GRPC_PORT, METRICS_PORT
from morph_client.errors import BadInput, Cancelled, InvalidRequest, MissingDependency, MorphError
from morph_client.report import files
from morph_client.server_process import StartFailed

EXIT_USAGE = 2
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
_TYPED = "morph_client.typed"


def port(variable: str, default: int) -> int:
    """The port that the server in the same environment has. Raises :class:`BadInput` for what is no port."""
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise BadInput(f"{variable} must be a port between 1 and 65535, but is '{text}'")
    return int(text)


def metrics_port() -> int:
    """Where the metrics page is, unless an address is given."""
    return port("MORPH_METRICS_PORT", METRICS_PORT)


def _url(given: str) -> str:
    return given or f"localhost:{port('MORPH_GRPC_PORT', GRPC_PORT)}"


UrlOption = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="MORPH_URL",
        callback=_url,
        help="Triton's gRPC endpoint, host:port.",
        show_default=f"{DEFAULT_URL}, or at MORPH_GRPC_PORT",
    ),
]
MetricsUrlOption = Annotated[
    str, typer.Option("--metrics-url", envvar="MORPH_METRICS_URL", help="Triton's metrics page.")
]


def command_line(ctx: typer.Context) -> str:
    """What was typed to start this command, with the ``MORPH_*`` variables that it ran under. No secrets."""
    typed = ctx.meta.get(_TYPED, [])
    settings = [f"{k}={shlex.quote(v)}" for k, v in sorted(os.environ.items()) if k.startswith("MORPH_") and v]
    return " ".join([*(s for s in settings if "KEY" not in s.split("=")[0]), shlex.join(["morph", *typed])])


@contextmanager
def orderly_termination() -> Iterator[None]:
    """Lets SIGTERM end the command as Ctrl-C does, so that the server is ended on the way out."""
    terminated = False

    def leave(_number: int, _frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        # asyncio knows how to unwind after this signal; an exception of our own it would report as a fault.
        signal.raise_signal(signal.SIGINT)

    # A shell starts background jobs with SIGINT ignored.
    wanted = {signal.SIGTERM: leave, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    except KeyboardInterrupt:
        if terminated:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class OneSentenceGroup(TyperGroup):
    """Turns the errors of this package into one sentence on standard error and an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keeps the arguments as they were typed, for reports."""
        ctx.meta.setdefault(_TYPED, list(args))
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        """Runs a subcommand."""
        try:
            return super().invoke(ctx)
        except MorphError as error:
            console = stderr()
            if isinstance(error, StartFailed) and error.log_tail:
                console.print(error.log_tail, style="dim", markup=False, highlight=False)
            console.print(f"morph: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(_status(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None


def stdout() -> Console:
    """For results. Made at each use, so that it follows a redirected ``sys.stdout``."""
    return Console(highlight=False)


def stderr() -> Console:
    """For what accompanies a result."""
    return Console(stderr=True, highlight=False)


def _status(error: MorphError) -> int:
    if isinstance(error, (BadInput, InvalidRequest, MissingDependency)):
        return EXIT_USAGE
    return EXIT_INTERRUPTED if isinstance(error, Cancelled) else EXIT_FAILURE


def write_report(out: Path, report: dict[str, Any], write_png: Callable[[dict[str, Any], Path], None]) -> None:
    """Writes ``report`` to ``out`` and its picture beside it, if it can be drawn here, and says what there is."""
    files.write_json(out, report)
    written = [out]
    try:
        write_png(report, out.with_suffix(".png"))
        written.append(out.with_suffix(".png"))
    except MissingDependency as error:
        stderr().print(str(error), style="yellow", markup=False)
    stdout().print("Written: " + ", ".join(map(str, written)), soft_wrap=True, markup=False)
