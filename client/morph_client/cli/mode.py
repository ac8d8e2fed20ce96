"""``morph mode``: how far the server may degrade precision, shown and changed while it serves."""

from __future__ import annotations

from typing import Annotated

import typer

from morph_client import prometheus
from morph_client.address import metrics_url_for
from morph_client.cli.common import MetricsUrlOption, UrlOption, metrics_port, stdout
from morph_client.errors import BadInput, ServerError
from morph_client.state import PREFIXES, ServerState
from morph_client.sync_client import MorphClient

MODES = ("accuracy", "balanced", "performance", "off")


def mode(
    new: Annotated[str, typer.Argument(metavar="MODE", help="accuracy, balanced, performance or off.")] = "",
    cap: Annotated[
        float | None, typer.Option(help="Share of the levels that may be used, 0 (full precision alone) to 1.")
    ] = None,
    admin_key: Annotated[str, typer.Option(envvar="MORPH_ADMIN_KEY", help="The server's key.", show_envvar=True)] = "",
    url: UrlOption = "",
    metrics_url: MetricsUrlOption = "",
    model: Annotated[str, typer.Option(help="The model's name in Triton.")] = "morph",
) -> None:
    """Show the controller's mode and cap, or change them without a restart."""
    if not new and cap is None:
        _show(metrics_url or metrics_url_for("localhost", metrics_port()), model)
        return
    if new and new not in MODES:
        raise BadInput(f"the mode must be one of {', '.join(MODES)}, not '{new}'")
    if cap is not None and not 0 <= cap <= 1:
        raise BadInput(f"--cap must be between 0 and 1, not {cap:g}")
    if not admin_key:
        raise BadInput("a change takes the server's key: set MORPH_ADMIN_KEY for the server and for this command")
    with MorphClient(url, model=model) as client:
        stdout().print(client.set_mode(new, cap=cap, admin_key=admin_key), markup=False)


def _show(metrics_url: str, model: str) -> None:
    state = ServerState.read(prometheus.scrape(metrics_url, 5.0, PREFIXES), model)
    if state.mode is None:
        raise ServerError(f"{metrics_url} has no morph_mode for a model '{model}': is the model loaded?")
    cap = "" if state.cap is None else f", cap {state.cap:g}"
    stdout().print(f"mode {state.mode}{cap}, level {state.level} of {state.level_max}.", markup=False)
