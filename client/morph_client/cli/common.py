"""What the subcommands share: the two consoles, the address options, and how errors are told."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from morph_client.address import DEFAULT_URL, GRPC_PORT, METRICS_PORT
from morph_client.errors import BadInput, Cancelled, InvalidRequest, MissingDependency, MorphError
from morph_client.server_process import StartFailed

EXIT_USAGE = 2
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130


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


class OneSentenceGroup(TyperGroup):
    """Turns the errors of this package into one sentence on standard error and an exit status."""

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
