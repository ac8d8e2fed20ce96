"""``morph replay``: a recorded trace against a running server, in open loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from morph_client.address import grpc_target, metrics_url_for
from morph_client.cli.common import MetricsUrlOption, UrlOption, metrics_port, stderr, stdout
from morph_client.cli.replay_run import Cuts, ReplayPlan, describe, replay_trace
from morph_client.errors import MissingDependency, ServerError
from morph_client.prompts import words_of
from morph_client.report import files, plot, table
from morph_client.report.data import Run, run_to_json
from morph_client.traces import read_trace

_LATE_S = 0.1


def replay(
    trace: Annotated[Path, typer.Argument(help="A CSV file: ours, Azure 2023 or BurstGPT, told by its columns.")],
    speed: Annotated[float, typer.Option(help="Divide all times by this.")] = 1.0,
    thin: Annotated[float, typer.Option(help="Keep one request in this many, drawn at random.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For the thinning and the prompts.")] = 0,
    offset: Annotated[float, typer.Option(help="Start this many seconds into the trace.")] = 0.0,
    window: Annotated[float | None, typer.Option(help="Replay this many seconds of the trace.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Cut longer prompts.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="Cut longer outputs.")] = None,
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help="Drop rows of 0 tokens (failed requests).")] = False,
    text: Annotated[Path | None, typer.Option(help="Cut prompts from this text file.")] = None,
    tokens_per_word: Annotated[float | None, typer.Option(help="Default: measured with one request.")] = None,
    ttft_slo: Annotated[float | None, typer.Option(min=0.0, help="Target for the first token, in seconds.")] = None,
    deadline: Annotated[float, typer.Option(min=0.1, help="Give up a request after this many seconds.")] = 600.0,
    connections: Annotated[int, typer.Option(min=1, help="Connections to spread the requests over.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file, and a picture.")] = None,
    url: UrlOption = "",
    metrics_url: MetricsUrlOption = "",
) -> None:
    """Send a trace's requests when they are due, and print what became of them."""
    cuts = Cuts(offset, window, thin, seed, speed, max_prompt_tokens, max_output_tokens)
    plan = ReplayPlan(
        trace=cuts.apply(read_trace(trace, skip_zero_tokens=skip_empty)),
        cuts=cuts,
        words=words_of(text),
        tokens_per_word=tokens_per_word,
        ttft_slo_s=ttft_slo,
        deadline_s=deadline,
        connections=connections,
        url=url,
        metrics_url=metrics_url or metrics_url_for(grpc_target(url), metrics_port()),
    )
    if out is not None:
        files.check_writable(out)
    console = stdout()
    console.print(describe(plan), style="dim")
    run = asyncio.run(replay_trace(plan, console))
    console.print(table.render(table.summary_rows([run]), [run]))
    _warn(run)
    if out is not None:
        _write(plan, run, out)
    if run.summary.errors == run.summary.requests:
        raise ServerError(f"every request failed: {next(iter(run.summary.error_kinds))}")


def _warn(run: Run) -> None:
    console = stderr()
    for sentence, count in list(run.summary.error_kinds.items())[:3]:
        console.print(f"{count} × {sentence}", style="yellow", markup=False)
    if run.summary.max_lateness_s > _LATE_S:
        console.print(
            f"This client fell up to {table.seconds(run.summary.max_lateness_s)} behind its own schedule; "
            "the times to first token include that.",
            style="yellow",
        )
    if not run.states:
        console.print(
            "The metrics page could not be read, so level and KV cache over time are missing.", style="yellow"
        )


def _write(plan: ReplayPlan, run: Run, out: Path) -> None:
    files.write_json(out, {**plan.to_json(), "run": run_to_json(run)})
    written = [out]
    panels = ("load", "ttft", "queue", "level", "kv") if run.states else ("load", "ttft")
    s = run.summary
    subtitle = (
        f"{describe(plan)} TTFT p50 {table.seconds(s.ttft_s.p50)}, p95 {table.seconds(s.ttft_s.p95)}; "
        f"{s.output_tokens_per_s:.0f} output tokens per second; {s.errors} errors."
    )
    picture = plot.Picture(f"Replay, mode {run.mode}", subtitle, [run], (), panels)
    image = out.with_suffix(".png")
    try:
        plot.write_png(picture, image)
        written.append(image)
    except MissingDependency as error:
        stderr().print(str(error), style="yellow", markup=False)
    stdout().print("Written: " + ", ".join(str(path) for path in written), soft_wrap=True, markup=False)
