"""``morph top``: what the server is doing now, as a page that redraws itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from morph_client import prometheus
from morph_client.address import metrics_url_for
from morph_client.cli.common import MetricsUrlOption, metrics_port, stdout
from morph_client.cli.top_frame import frame
from morph_client.cli.top_history import History
from morph_client.errors import ServerError, ServerUnavailable
from morph_client.state import PREFIXES, ServerState


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one page and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
    metrics_url: MetricsUrlOption = "",
    model: Annotated[str, typer.Option(help="The model's name in Triton.")] = "morph",
) -> None:
    """Watch precision, KV cache, queue and latency."""
    console = stdout()
    metrics_url = metrics_url or metrics_url_for("localhost", metrics_port())
    history = History()
    # The first look is not forgiven: a wrong address should not show an empty page.
    state = _look(metrics_url, model)
    if state.level is None:
        raise ServerError(f"{metrics_url} has no morph_level for a model '{model}': is the model loaded?")
    history.add(time.monotonic(), state)
    if once:
        console.print(frame(history, metrics_url, console))
        return
    try:
        _watch(history, metrics_url, model, interval, console)
    except KeyboardInterrupt:
        return  # the way to leave a page that never ends


def _watch(history: History, metrics_url: str, model: str, interval: float, console: Console) -> None:
    if not console.is_terminal:  # a file or a pipe gets one page after the other
        console.print(frame(history, metrics_url, console))
        for _ in _looks(history, metrics_url, model, interval):
            console.print(frame(history, metrics_url, console))
        return
    with Live(frame(history, metrics_url, console), console=console, screen=True, auto_refresh=False) as live:
        for _ in _looks(history, metrics_url, model, interval):
            live.update(frame(history, metrics_url, console), refresh=True)


def _looks(history: History, metrics_url: str, model: str, interval: float) -> Iterator[None]:
    """Never ends: after each look, which may fail."""
    never = threading.Event()
    while not never.wait(interval):
        try:
            history.add(time.monotonic(), _look(metrics_url, model))
        except (ServerUnavailable, ServerError) as error:
            history.lost(str(error))
        yield


def _look(metrics_url: str, model: str) -> ServerState:
    return ServerState.read(prometheus.scrape(metrics_url, 5.0, PREFIXES), model)
