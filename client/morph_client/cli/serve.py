"""``morph serve``: the embedded server, in the foreground."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from morph_client.server_process import LAUNCHER, require_launcher


def serve(
    model: Annotated[str | None, typer.Option(help="Model folder or pack; default: the demo model.")] = None,
    mode: Annotated[str | None, typer.Option(help="accuracy, balanced, performance or off.")] = None,
    memory_budget_gib: Annotated[
        float | None, typer.Option(min=0.0, help="Memory for weights, KV cache and workspace, in GiB.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 8000.")] = None,
    grpc_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 8001.")] = None,
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 8002.")] = None,
) -> None:
    """Run Triton with the model, until Ctrl-C. A flag wins over the variable MORPH_MODEL, MORPH_MODE and so on."""
    require_launcher()
    given = {
        "MORPH_MODEL": model,
        "MORPH_MODE": mode,
        "MORPH_MEMORY_BUDGET_GIB": memory_budget_gib,
        "MORPH_HTTP_PORT": http_port,
        "MORPH_GRPC_PORT": grpc_port,
        "MORPH_METRICS_PORT": metrics_port,
    }
    environment = {**os.environ, **{name: str(value) for name, value in given.items() if value is not None}}
    sys.stdout.flush()
    # Takes this process's place, so that a signal to it reaches the server without a middleman.
    os.execve(sys.executable, [sys.executable, "-m", LAUNCHER], environment)
