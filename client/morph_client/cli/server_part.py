"""Commands whose work is done by the server part, in a process of its own: neither it nor torch is loaded here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence

import typer

from morph_client.errors import MissingDependency, MorphError

RUNTIME = "morph_runtime"


def require_server_part() -> None:
    """Raises :class:`MissingDependency` unless the server part is installed, with what it needs."""
    # Found without importing: neither may be loaded into the client.
    if any(importlib.util.find_spec(name) is None for name in (RUNTIME, "torch", "msgspec")):
        raise MissingDependency("the server part is not installed: pip install 'morphserve[server]'")


def run_module(module: str, arguments: Sequence[str]) -> None:
    """Runs a module of the server part to its end; what it says goes where this process's words go.

    Raises :class:`typer.Exit` with its status if it told its reason, :class:`MorphError` if a signal ended it.
    """
    require_server_part()
    sys.stdout.flush()
    status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if status < 0:
        raise MorphError(f"{module} was ended by signal {-status}; if that was not you, look for a lack of memory")
    if status:
        raise typer.Exit(status)
