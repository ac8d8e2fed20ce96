"""``morph costs``: what steps and shifts cost here, measured by the server part; the tables are made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from morph_client.cli.common import stdout
from morph_client.cli.server_part import run_module
from morph_client.report import costs_table, files

FILE = "engine.json"


def costs(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint or a pack.")],
    out: Annotated[Path, typer.Option(help=f"The engine profile (.json), or a folder to write {FILE} into.")],
    awq: Annotated[Path | None, typer.Option(help="AWQ checkpoint of the model, which W4 comes from.")] = None,
    ladder: Annotated[str | None, typer.Option(help="w8, w4 or w8,w4.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="For measuring, roughly.")] = 20.0,
    held_out_seconds: Annotated[float, typer.Option(min=0.1, max=600, help="For checking, shifts apart.")] = 20.0,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="CPU threads; 0: all cores but one.")] = None,
    budget_gib: Annotated[float | None, typer.Option(min=0, help="Memory budget of the engine.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(min=16, help="KV cache where there is no budget.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests that run at the same time.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of one step.")] = None,
) -> None:
    """Measure step times by rung and batch, attention, and shifts; write an engine profile for planning.

    Settings that are not given are those of serving: the environment's (MORPH_...), else the defaults.
    """
    target = out if out.suffix == ".json" else out / FILE
    files.make_folder(target.parent)
    given = {
        "--awq": awq, "--ladder": ladder, "--dtype": dtype, "--device": device, "--threads": threads,
        "--budget-gib": budget_gib, "--kv-tokens": kv_tokens, "--max-num-seqs": max_num_seqs,
        "--max-num-batched-tokens": max_num_batched_tokens, "--seconds": seconds,
        "--held-out-seconds": held_out_seconds,
    }  # fmt: skip
    arguments = [f"{name}={value}" for name, value in given.items() if value is not None]
    run_module("morph_runtime.costs", [*arguments, f"--out={target}", "--", str(model)])
    profile = json.loads(target.read_text(encoding="utf-8"))
    stdout().print(costs_table.describe(profile), style="dim", soft_wrap=True, markup=False)
    for table in (
        costs_table.render_steps(profile),
        costs_table.render_rest(profile),
        costs_table.render_held_out(profile["held_out"]),
    ):
        stdout().print(table)
        stdout().print()
    stdout().print(f"Written: {target}", soft_wrap=True, markup=False)
