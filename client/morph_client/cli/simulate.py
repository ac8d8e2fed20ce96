"""``morph simulate``: the trace is read and cut here, the server part simulates; table and picture are made here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from morph_client.cli import replay_options as options
from morph_client.cli.common import stdout, write_report
from morph_client.cli.server_part import run_module
from morph_client.replay_plan import Cuts
from morph_client.report import files, simulate_plot, simulate_table
from morph_client.trace_store import find_trace
from morph_client.traces import read_trace

SIMULATOR = "morph_runtime.simulate"


def simulate(
    trace: options.TraceArgument,
    profile: Annotated[Path, typer.Option(help="Engine profile (JSON): costs, KV capacities and limits of an engine.")],
    slo: Annotated[float, typer.Option("--ttft-slo", "--slo", help="Target for the first token, in seconds.")] = 2.0,
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
    speed: options.SpeedOption = 1.0,
    thin: options.ThinOption = 1.0,
    keep_every: options.KeepEveryOption = 1,
    seed: options.SeedOption = 0,
    offset: options.OffsetOption = 0.0,
    window: options.WindowOption = None,
    max_prompt_tokens: options.MaxPromptOption = None,
    max_output_tokens: options.MaxOutputOption = None,
    fixed_prompt: options.FixedPromptOption = None,
    fixed_output: options.FixedOutputOption = None,
    skip_empty: options.SkipEmptyOption = False,
    out: Annotated[Path | None, typer.Option(help="JSON file; the picture is written beside it as .png.")] = None,
) -> None:
    """What morphing would do to a trace: the real controller on a model of the engine, hours in seconds."""
    cuts = Cuts(
        offset, window, keep_every, thin, seed, speed, max_prompt_tokens, max_output_tokens, fixed_prompt, fixed_output
    )
    cut = cuts.apply(read_trace(find_trace(trace), skip_zero_tokens=skip_empty))
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
    console = stdout()
    console.print(simulate_table.describe(report), style="dim", soft_wrap=True, markup=False)
    for table in simulate_table.render(report, console.width):
        console.print("", table)
    if out is not None:
        write_report(out, report, simulate_plot.write_png)
