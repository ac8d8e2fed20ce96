"""``morph quality``: what levels cost, measured by the server part; table and picture are made here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from morph_client.cli.common import stdout, write_report
from morph_client.cli.server_part import run_module
from morph_client.report import files, quality_plot, quality_table

MEASURER = "morph_runtime.profile"


def quality(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint or a pack.")],
    text: Annotated[Path, typer.Option(help="Text to measure on, UTF-8, plain or .xz: one the model was not made on.")],
    awq: Annotated[Path | None, typer.Option(help="AWQ checkpoint of the model: its W4 beside rounding.")] = None,
    ladder: Annotated[
        list[str] | None, typer.Option(help="w8, w4 or w8,w4; repeatable. Default: w8,w4 and w4.")
    ] = None,
    order: Annotated[
        list[str] | None, typer.Option(help="Layer order, as for pack, or random:SEED; repeatable. Default: auto.")
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Which levels, as 3,6,12; default: about six per rung.")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Every n-th level.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 32,
    window_tokens: Annotated[int, typer.Option(min=16, help="Tokens of a piece.")] = 512,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores but one.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file; the picture is written beside it as .png.")] = None,
) -> None:
    """Perplexity, KL divergence from full precision and top-1 agreement, by level and rung."""
    given = {"--awq": awq, "--levels": levels, "--every": every, "--dtype": dtype, "--device": device}
    arguments = [f"{name}={value}" for name, value in given.items() if value is not None]
    arguments += [f"--ladder={value}" for value in ladder or ()] + [f"--order={value}" for value in order or ()]
    arguments += [f"--windows={windows}", f"--window-tokens={window_tokens}", f"--threads={threads}", f"--text={text}"]
    if out is not None:
        files.check_writable(out)
    with tempfile.TemporaryDirectory(prefix="morph-quality-") as folder:
        result = Path(folder) / "quality.json"
        run_module(MEASURER, ["quality", *arguments, f"--out={result}", "--", str(model)])
        report = json.loads(result.read_text(encoding="utf-8"))
    stdout().print(quality_table.describe(report), style="dim", soft_wrap=True)
    stdout().print(quality_table.render(report))
    if out is not None:
        write_report(out, report, quality_plot.write_png)
