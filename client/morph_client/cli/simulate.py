"""``morph simulate``: the trace is read and cut here, the server part simulates; table and picture are made here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from morph_client.cli.common import stderr, stdout
from morph_client.cli.server_part import run_module
from morph_client.errors import MissingDependency
from morph_client.report import files, simulate_plot, simulate_table
from morph_client.traces import clip, cut_window, read_trace, speed_up, thin

SIMULATOR = "morph_runtime.simulate"


def simulate(
    trace: Annotated[Path, typer.Argument(help="A CSV file: ours, Azure 2023 or BurstGPT, told by its columns.")],
    profile: Annotated[Path, typer.Option(help="Engine profile (JSON): costs, KV capacities and limits of an engine.")],
    slo: Annotated[float, typer.Option(help="Target for the first token, in seconds.")] = 2.0,
    tpot_slo: Annotated[float, typer.Option(help="Target per further token, in seconds; 0: none.")] = 0.0,
    mode: Annotated[list[str] | None, typer.Option(help="Of the controller; repeatable. Default: balanced.")] = None,
    static: Annotated[list[str] | None, typer.Option(help="Rung served throughout; repeatable. Default: all.")] = None,
    dwell: Annotated[float | None, typer.Option(help="The controller's dwell time, in seconds.")] = None,
    interval: Annotated[float | None, typer.Option(help="Seconds between decisions.")] = None,
    signal_delay: Annotated[float | None, typer.Option(help="Age of Triton's queue signal, in seconds.")] = None,
    model_error: Annotated[
        str | None, typer.Option(help="Share by which the cost model errs; or one per rung.")
    ] = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="Also without KV growth, and without speed.")] = False,
    sweep: Annotated[
        list[str] | None, typer.Option(help="slo, dwell, interval, error, quantized-error, delay or rate: NAME=1,2,4.")
    ] = None,
    replicas: Annotated[list[str] | None, typer.Option(help="A fleet: auto, or a number; repeatable.")] = None,
    replica_start: Annotated[float | None, typer.Option(help="Seconds until a new server is ready.")] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="The autoscaler's limit.")] = None,
    speed: Annotated[float, typer.Option(help="Divide all times by this.")] = 1.0,
    thinning: Annotated[float, typer.Option("--thin", help="Keep one request in this many, drawn at random.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For the thinning.")] = 0,
    offset: Annotated[float, typer.Option(help="Start this many seconds into the trace.")] = 0.0,
    window: Annotated[float | None, typer.Option(help="Simulate this many seconds of the trace.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Cut longer prompts.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="Cut longer outputs.")] = None,
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help="Drop rows of 0 tokens (failed requests).")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file; the picture is written beside it as .png.")] = None,
) -> None:
    """What morphing would do to a trace: the real controller on a model of the engine, hours in seconds."""
    cut = cut_window(read_trace(trace, skip_zero_tokens=skip_empty), offset, window)
    cut = clip(speed_up(thin(cut, thinning, seed), speed), max_prompt_tokens, max_output_tokens)
    given = {
        "--dwell": dwell, "--interval": interval, "--signal-delay": signal_delay, "--model-error": model_error,
        "--replica-start": replica_start, "--max-replicas": max_replicas,
    }  # fmt: skip
    arguments = [f"{name}={value}" for name, value in given.items() if value is not None]
    listed = {"--mode": mode, "--static": static, "--sweep": sweep, "--replicas": replicas}
    arguments += [f"{name}={value}" for name, values in listed.items() for value in values or ()]
    arguments += [f"--slo={slo}", f"--tpot-slo={tpot_slo}", f"--profile={profile}", *["--ablation"][: int(ablation)]]
    if out is not None:
        files.check_writable(out)
    with tempfile.TemporaryDirectory(prefix="morph-simulate-") as folder:
        requests, result = Path(folder) / "trace.json", Path(folder) / "result.json"
        columns = {
            "arrival_s": [r.arrival_s for r in cut.requests],
            "prompt_tokens": [r.prompt_tokens for r in cut.requests],
            "output_tokens": [r.output_tokens for r in cut.requests],
        }
        requests.write_text(json.dumps({"source": cut.source, **columns}), encoding="utf-8")
        run_module(SIMULATOR, [*arguments, f"--out={result}", "--", str(requests)])
        report = json.loads(result.read_text(encoding="utf-8"))
    stdout().print(simulate_table.describe(report), style="dim", soft_wrap=True)
    for table in simulate_table.render(report):
        stdout().print(table)
    if out is None:
        return
    files.write_json(out, report)
    written = [out]
    try:
        simulate_plot.write_png(report, out.with_suffix(".png"))
        written.append(out.with_suffix(".png"))
    except MissingDependency as error:
        stderr().print(str(error), style="yellow", markup=False)
    stdout().print("Written: " + ", ".join(map(str, written)), soft_wrap=True, markup=False)
