"""``morph replay``: a recorded trace against a running server, in open loop."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from morph_client.address import grpc_target, metrics_url_for
from morph_client.agreement import Agreement, Reference
from morph_client.aio_client import AsyncMorphClient
from morph_client.cli import replay_options as options
from morph_client.cli.common import MetricsUrlOption, UrlOption, command_line, metrics_port, stderr, stdout
from morph_client.cli.replay_run import under_a_bar
from morph_client.errors import BadInput, MissingDependency, ServerError
from morph_client.replay_plan import Cuts, PromptSource, ReplayPlan, describe, make_plan
from morph_client.replay_run import Replayed, ReplayWatch, prepare, run_replay
from morph_client.report import files, replay_page, table
from morph_client.report.data import Run, run_to_json
from morph_client.stats import Targets

_LATE_S = 0.1


def replay(
    ctx: typer.Context,
    trace: options.TraceArgument,
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
    text: options.TextOption = None,
    tokens_per_word: options.TokensPerWordOption = None,
    shared_prefix: options.SharedPrefixOption = 0,
    prefixes: options.PrefixesOption = 1,
    temperature: options.TemperatureOption = 0.0,
    ttft_slo: Annotated[float | None, typer.Option(help="Target for the first token, in seconds.")] = None,
    tpot_slo: options.TpotSloOption = None,
    reference: Annotated[Path | None, typer.Option(help="Compare outputs with those of this earlier --out.")] = None,
    save_outputs: Annotated[bool, typer.Option("--save-outputs", help="Keep prompts and outputs in --out.")] = False,
    deadline: options.DeadlineOption = 600.0,
    connections: options.ConnectionsOption = 1,
    out: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file; page and picture too.")] = None,
    url: UrlOption = "",
    metrics_url: MetricsUrlOption = "",
) -> None:
    """Send a trace's requests when they are due, and print what became of them."""
    plan = make_plan(
        trace,
        Cuts(
            offset, window, keep_every, thin, seed, speed, max_prompt_tokens, max_output_tokens, fixed_prompt,
            fixed_output,
        ),
        PromptSource(text, tokens_per_word, shared_prefix, prefixes),
        Targets(ttft_slo, tpot_slo),
        skip_empty=skip_empty,
        deadline_s=deadline,
        connections=connections,
        temperature=temperature,
        keep_text=save_outputs or reference is not None,
    )  # fmt: skip
    if save_outputs and out is None:
        raise BadInput("--save-outputs keeps outputs in the file that --out names: give --out too")
    known = None if reference is None else Reference.read(reference)
    if out is not None:
        files.check_writable(out)
    console = stdout()
    console.print(describe(plan), style="dim", soft_wrap=True, markup=False)
    metrics = metrics_url or metrics_url_for(grpc_target(url), metrics_port())
    done = asyncio.run(_replay(plan, url, metrics, known))
    run, same = done.run, None if known is None else known.agreement(done.run.records)
    rows = table.summary_rows([run]) + table.agreement_rows([same])
    console.print(table.render(rows, [run]))
    _warn(run)
    if out is not None:
        _write(plan, done, same, rows, command_line(ctx), out, save_outputs)
    if run.summary.errors == run.summary.requests:
        raise ServerError(f"every request failed: {next(iter(run.summary.error_kinds))}")


async def _replay(plan: ReplayPlan, url: str, metrics_url: str, reference: Reference | None) -> Replayed:
    async with AsyncMorphClient(url, metrics_url=metrics_url, connections=plan.connections) as client:
        requests = await prepare(plan, client)
        if reference is not None:
            reference.check(plan.fingerprint(requests))
        watch = ReplayWatch()
        return await under_a_bar(run_replay(plan, client, requests, watch), watch, stdout(), "replaying")


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


def _write(
    plan: ReplayPlan,
    done: Replayed,
    same: Agreement | None,
    rows: list[table.Row],
    command: str,
    out: Path,
    save_outputs: bool,
) -> None:
    figures = run_to_json(done.run)
    for record, planned in zip(figures["requests"], done.requests, strict=True):
        if save_outputs:
            record["prompt"] = planned.prompt
        else:
            record.pop("text", None)
    value = {
        "command": command,
        **plan.to_json(),
        "fingerprint": done.fingerprint,
        "agreement": None if same is None else asdict(same),
        "run": figures,
    }
    files.write_json(out, value)
    written = [out]
    try:
        written += replay_page.write(plan, done.run, rows, command, out)
    except MissingDependency as error:
        stderr().print(str(error), style="yellow", markup=False)
    stdout().print("Written: " + ", ".join(str(path) for path in written), soft_wrap=True, markup=False)
