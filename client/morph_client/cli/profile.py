"""``morph profile``: a layer order, found by the server part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from morph_client.cli.common import stdout
from morph_client.cli.server_part import run_module
from morph_client.report import files, quality_table

FILE = "order.json"


def profile(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint or a pack.")],
    text: Annotated[Path, typer.Option(help="Text like what the model will be asked, UTF-8, plain or .xz.")],
    out: Annotated[Path, typer.Option(help=f"The order file (.json), or a folder to write {FILE} into.")],
    awq: Annotated[Path | None, typer.Option(help="AWQ checkpoint of the model, which W4 comes from.")] = None,
    rung: Annotated[list[str] | None, typer.Option(help="w8 or w4; repeatable. Default: both.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of LTS, LRS and MDS; default: 0.25,0.25,0.5.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 8,
    window_tokens: Annotated[int, typer.Option(min=16, help="Tokens of a piece.")] = 512,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores but one.")] = 0,
) -> None:
    """Find the order in which layers should be quantized, by their importance (LIS), for each rung."""
    target = out if out.suffix == ".json" else out / FILE
    files.make_folder(target.parent)
    given = {"--awq": awq, "--weights": weights, "--dtype": dtype, "--device": device}
    arguments = [f"{name}={value}" for name, value in given.items() if value is not None]
    arguments += [f"--rung={value}" for value in rung or ()]
    arguments += [f"--windows={windows}", f"--window-tokens={window_tokens}", f"--threads={threads}", f"--text={text}"]
    run_module("morph_runtime.profile", ["profile", *arguments, f"--out={target}", "--", str(model)])
    for name, found in json.loads(target.read_text(encoding="utf-8"))["rungs"].items():
        stdout().print(quality_table.render_order(name, found["scores"]))
    stdout().print(
        f"{target}: pack it with 'morph pack --order {target}', or set MORPH_ORDER={target.absolute()}", soft_wrap=True
    )
