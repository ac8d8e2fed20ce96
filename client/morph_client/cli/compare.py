"""``morph compare``: one trace, several configurations of the server, one table."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from morph_client.aio_client import AsyncMorphClient
from morph_client.cli import replay_options as options
from morph_client.cli.common import command_line, orderly_termination, stderr, stdout
from morph_client.cli.replay_run import under_a_bar
from morph_client.compare.configurations import BASELINE, Configuration, interleaved, parse
from morph_client.compare.fit import fitted_speed, output_capacity
from morph_client.compare.level_loss import LevelLosses
from morph_client.compare.measure import Bench, measure
from morph_client.compare.result import OneRun, build
from morph_client.compare.scoring import Score, Scorer
from morph_client.errors import BadInput, MissingDependency
from morph_client.loadgen import Planned
from morph_client.replay_plan import Cuts, PromptSource, describe, make_plan
from morph_client.replay_run import Replayed, ReplayWatch, prepare
from morph_client.report import compare_page, compare_table, files, plot, table
from morph_client.report.data import run_to_json
from morph_client.server_process import EmbeddedServer, require_launcher
from morph_client.stats import Targets

# Prompts are scored in pieces of at most this many tokens; the server's own default is made for serving.
_SCORING = {"MORPH_MAX_NUM_SEQS": "256", "MORPH_MAX_NUM_BATCHED_TOKENS": "512"}


def compare(
    ctx: typer.Context,
    trace: options.TraceArgument,
    model: Annotated[
        Path | None, typer.Option(help="Model folder or pack; default: MORPH_MODEL, else the demo.")
    ] = None,
    configs: Annotated[
        str, typer.Option(help="Of full, w8, w4, accuracy, balanced, performance; a mode's own ladder: balanced:w8+w4.")
    ] = "full,w8,w4,balanced",
    ladder: Annotated[str | None, typer.Option(help="Ladder of the modes; default: MORPH_LADDER, else w4.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each configuration, interleaved.")] = 3,
    memory_budget_gib: Annotated[float | None, typer.Option(help="The same for all, as in morph serve.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="KV tokens at full precision, if no budget is given.")] = None,
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
    ttft_slo: Annotated[float, typer.Option(help="Target for the first token, of report and controller.")] = 2.0,
    tpot_slo: options.TpotSloOption = None,
    fit: Annotated[
        float | None,
        typer.Option(help="Set the speed so that the busiest 10 s ask for this many times what full precision serves."),
    ] = None,
    quality: Annotated[
        Path | None, typer.Option(help="Table of 'morph quality --out' for this model: the loss by tokens' levels.")
    ] = None,
    score: Annotated[int, typer.Option(min=0, help="Outputs of each run to score for perplexity; 0: none.")] = 100,
    deadline: options.DeadlineOption = 600.0,
    connections: options.ConnectionsOption = 1,
    start_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for each server start.")] = 600.0,
    out: Annotated[Path, typer.Option(help="Folder for figures, page, picture, runs and server logs.")] = Path(
        "compare-report"
    ),
) -> None:
    """Replay one trace against static rungs and morphing, each in a server of its own, and say what morphing buys."""
    chosen = parse(configs, ladder or os.environ.get("MORPH_LADDER") or "w4")
    order = interleaved(chosen, repeats)
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
        keep_text=True,
    )  # fmt: skip
    losses = None if quality is None else LevelLosses.read(quality)
    if fit is not None:
        fitted_speed(plan.trace.requests, 1.0, fit)
    folder = model or (Path(os.environ["MORPH_MODEL"]) if os.environ.get("MORPH_MODEL") else None)
    if folder is not None and not folder.is_dir():
        raise BadInput(f"the model folder {folder} does not exist")
    require_launcher()
    files.make_folder(out / "runs")
    given = {
        "MORPH_MODEL": folder, "MORPH_MEMORY_BUDGET_GIB": memory_budget_gib, "MORPH_KV_TOKENS": kv_tokens,
        "MORPH_TTFT_SLO_S": ttft_slo,
    }  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in given.items() if value is not None}}
    bench = Bench(plan, environment, out, start_timeout)
    console = stdout()
    with orderly_termination():
        if fit is not None:
            bench = _fit(console, bench, chosen, fit)
        console.print(describe(bench.plan), style="dim", soft_wrap=True, markup=False)
        runs, requests = _measure_all(console, bench, order, out)
        if losses is not None:
            runs = [replace(one, level_loss=losses.change(one.configuration.ladder, one.run.by_level)) for one in runs]
        if score:
            runs = _score_all(console, bench, chosen, runs, requests, score)
    result: dict[str, Any] = {
        "command": command_line(ctx),
        **bench.plan.to_json(),
        "model": folder.name if folder else "the demo model",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "environment": {
            name: str(value) for name, value in given.items() if value is not None and name != "MORPH_MODEL"
        },
        "order": [configuration.name for _, configuration in order],
        "scored_per_run": score,
        "fitted_to": fit,
        "quality_table": losses and losses.source,
        **build(runs, chosen),
    }
    console.print(*compare_table.render(result, console.width))
    console.print(f"\n[bold]{compare_table.headline(result)}[/bold]\n")
    files.write_json(out / "result.json", result)
    written = [out / "result.json"]
    try:
        plot.require_matplotlib()
        written += compare_page.write(result, out)
    except MissingDependency as error:
        stderr().print(str(error), style="yellow", markup=False)
    console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True, markup=False)


def _fit(console: Console, bench: Bench, chosen: list[Configuration], share: float) -> Bench:
    """The bench with the plan's speed fitted to what full precision serves here."""
    full = next(c for c in chosen if c.name == BASELINE)

    async def capacity(server: EmbeddedServer) -> float:
        async with AsyncMorphClient(server.grpc_url, metrics_url=server.metrics_url) as client:
            return await output_capacity(client, await prepare(bench.plan, client))

    with bench.server(full, "server-fitting.log") as server, console.status("measuring what full precision serves"):
        server.wait_ready(bench.start_timeout_s)
        served = asyncio.run(capacity(server))
        server.check_alive()
        server.stop()
    speed = fitted_speed(bench.plan.trace.requests, served, share)
    console.print(f"Full precision serves {served:.0f} output tokens per second here.", style="dim")
    return replace(bench, plan=bench.plan.at_speed(speed))


def _measure_all(
    console: Console, bench: Bench, order: list[tuple[int, Configuration]], out: Path
) -> tuple[list[OneRun], list[Planned]]:
    """Every run in its turn; the first makes the prompts for all."""
    runs: list[OneRun] = []
    requests: list[Planned] = []
    for place, (repeat, configuration) in enumerate(order, 1):

        async def shown(replay: Awaitable[Replayed], watch: ReplayWatch, what: str) -> Replayed:
            return await under_a_bar(replay, watch, console, what)

        done = measure(bench, configuration, repeat, requests, shown)
        requests = done.requests
        runs.append(OneRun(configuration, repeat, done.run, {}))
        s = done.run.summary
        console.print(
            f"{place:>2} of {len(order)}  {configuration.label}: TTFT p95 {table.seconds(s.ttft_s.p95)}, "
            f"{s.slo_violations} of {s.requests} missed the target, {s.output_tokens_per_s:.0f} tokens/s",
            markup=False,
            soft_wrap=True,
        )
        name = f"{configuration.name.replace(':', '-')}-{repeat + 1}.json"
        files.write_json(out / "runs" / name, run_to_json(done.run))
    return runs, requests


def _score_all(
    console: Console,
    bench: Bench,
    chosen: list[Configuration],
    runs: list[OneRun],
    requests: list[Planned],
    count: int,
) -> list[OneRun]:
    """The runs with scores: of the same requests in each, spread evenly over the trace."""
    full = next(c for c in chosen if c.name == BASELINE)
    step = max(1, len(requests) // count)
    places = set(range(0, len(requests), step)) if step > 1 else set(range(len(requests)))

    async def score(url: str) -> list[OneRun]:
        scored = []
        async with AsyncMorphClient(url) as client:
            scorer = Scorer(client)
            for one in runs:
                wanted = [r for r in one.run.records if r.index in places and r.error is None and r.text]
                texts = [(requests[r.index].prompt, r.prompt_tokens, r.text or "") for r in wanted]
                found = zip(wanted, await scorer.score(texts), strict=True)
                scores: dict[int, Score] = {r.index: s for r, s in found if s is not None}
                scored.append(replace(one, scores=scores))
        return scored

    with bench.server(full, "server-scoring.log", _SCORING) as server, console.status("scoring what was generated"):
        server.wait_ready(bench.start_timeout_s)
        scored = asyncio.run(score(server.grpc_url))
        server.check_alive()
        server.stop()
    return scored
