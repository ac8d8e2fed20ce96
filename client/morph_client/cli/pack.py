"""``morph pack``: runs the server part's own command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from morph_client.cli.server_part import require_server_part

PACKER = "morph_runtime.pack"


def pack(
    model: Annotated[Path, typer.Argument(help="Folder of the unquantized checkpoint; with --verify, of the pack.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pack; must not exist or be empty.")] = None,
    awq: Annotated[Path | None, typer.Option(help="AWQ checkpoint of the model, which W4 comes from.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
    ladder: Annotated[str | None, typer.Option(help="Rungs below full precision; default: w8,w4.")] = None,
    order: Annotated[str | None, typer.Option(help="Layer order that servers take by default.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="RUNG=NAME: a kernel instead of the best here.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read a whole pack and compare its checksums.")] = False,
    source: Annotated[Path | None, typer.Option(help="With --verify: the checkpoint that it was made from.")] = None,
) -> None:
    """Prepare a model once, so that servers start fast; or verify what was prepared."""
    require_server_part()
    given = {"--out": out, "--awq": awq, "--dtype": dtype, "--ladder": ladder, "--order": order, "--source": source}
    arguments = [f"{name}={value}" for name, value in given.items() if value is not None]
    arguments += [f"--kernel={text}" for text in kernel or ()]
    arguments += ["--verify"] if verify else []
    sys.stdout.flush()
    # Takes this process's place: its exit status and its answer to Ctrl-C are the command's.
    os.execv(sys.executable, [sys.executable, "-m", PACKER, *arguments, "--", str(model)])
