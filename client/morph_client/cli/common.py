"""What the subcommands share: the two consoles, the address options, and how errors are told."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from morph_client.address import DEFAULT_URL
from morph_client.errors import BadInput, Cancelled, InvalidRequest, MissingDependency, MorphError
from morph_client.server_process import StartFailed

EXIT_USAGE = 2
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130

DEFAULT_METRICS_URL = "http://localhost:8002/metrics"

UrlOption = Annotated[
    str, typer.Option("--url", envvar="MORPH_URL", help="Triton's gRPC endpoint, host:port.", show_default=DEFAULT_URL)
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
