"""One replay: cuts the trace, measures the prompt text, sends the load under a progress bar."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from morph_client import loadgen
from morph_client.aio_client import AsyncMorphClient
from morph_client.prompts import PromptMaker, measure_tokens_per_word
from morph_client.report.data import Run
from morph_client.sampler import Samples, sample_until
from morph_client.stats import RequestRecord, summarise
from morph_client.traces import Trace, clip, cut_window, speed_up, thin

_REDRAW_S = 0.25
_SAMPLE_S = 0.5


@dataclass(frozen=True)
class Cuts:
    """What is replayed of a trace, and how it is scaled. Times in seconds."""

    offset_s: float
    window_s: float | None
    thin: float
    seed: int
    speed: float
    max_prompt_tokens: int | None
    max_output_tokens: int | None

    def apply(self, trace: Trace) -> Trace:
        """Window, then thinning, then speed, then length limits. Raises :class:`BadInput`."""
        trace = cut_window(trace, self.offset_s, self.window_s)
        trace = thin(trace, self.thin, self.seed)
        return clip(speed_up(trace, self.speed), self.max_prompt_tokens, self.max_output_tokens)


@dataclass(frozen=True)
class ReplayPlan:
    """A replay before it runs; ``trace`` is cut already."""

    trace: Trace
    cuts: Cuts
    words: list[str]
    tokens_per_word: float | None
    ttft_slo_s: float | None
    deadline_s: float
    connections: int
    url: str
    metrics_url: str | None

    def to_json(self) -> dict[str, Any]:
        """What a reader needs to repeat the replay."""
        return {
            "trace": self.trace.source,
            "format": self.trace.format,
            "cuts": asdict(self.cuts),
            "ttft_slo_s": self.ttft_slo_s,
            "deadline_s": self.deadline_s,
        }


def describe(plan: ReplayPlan) -> str:
    """File, cuts and size in two sentences."""
    cuts, requests = plan.cuts, plan.trace.requests
    parts = [f"{plan.trace.source} ({plan.trace.format} format)", f"offset {cuts.offset_s:g} s"]
    if cuts.window_s is not None:
        parts.append(f"window {cuts.window_s:g} s")
    if cuts.thin != 1:
        parts.append(f"thinned to one in {cuts.thin:g} with seed {cuts.seed}")
    if cuts.speed != 1:
        parts.append(f"time-compressed × {cuts.speed:g}")
    if cuts.max_prompt_tokens is not None:
        parts.append(f"prompts cut at {cuts.max_prompt_tokens} tokens")
    if cuts.max_output_tokens is not None:
        parts.append(f"outputs cut at {cuts.max_output_tokens} tokens")
    size = (
        f"{len(requests)} requests in {requests[-1].arrival_s:.1f} s, {sum(r.prompt_tokens for r in requests):,} "
        f"prompt and {sum(r.output_tokens for r in requests):,} output tokens"
    )
    return f"{', '.join(parts)}. {size}."


async def replay_trace(plan: ReplayPlan, console: Console) -> Run:
    """Runs the plan. Raises :class:`MorphError` if the server cannot be reached before the load begins."""
    async with AsyncMorphClient(plan.url, metrics_url=plan.metrics_url, connections=plan.connections) as client:
        ratio = plan.tokens_per_word or await measure_tokens_per_word(client, plan.words)
        requests = loadgen.plan_requests(plan.trace.requests, PromptMaker(plan.words, ratio, plan.cuts.seed))
        counts, samples, stop = loadgen.Progress(), Samples(), asyncio.Event()
        watcher = asyncio.create_task(
            sample_until(stop, samples, metrics_url=client.metrics_url, model=client.model, interval_s=_SAMPLE_S)
        )
        load = asyncio.create_task(loadgen.run_load(client, requests, progress=counts, deadline_s=plan.deadline_s))
        try:
            records = await _under_a_bar(load, counts, samples, console)
        finally:
            load.cancel()
            stop.set()
            await watcher
    state = samples.latest
    mode = (state.mode if state else None) or "unknown"
    summary = summarise(records, plan.ttft_slo_s)
    return Run(mode, f"mode {mode}" if state else "replay", records, summary, samples.states)


async def _under_a_bar(
    load: asyncio.Task[list[RequestRecord]], counts: loadgen.Progress, samples: Samples, console: Console
) -> list[RequestRecord]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}", style="dim"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("replaying", total=counts.total, now="")
        while not load.done():
            await asyncio.wait([load], timeout=_REDRAW_S)
            _redraw(bar, task, counts, samples)
    return load.result()


def _redraw(bar: Progress, task: TaskID, counts: loadgen.Progress, samples: Samples) -> None:
    state = samples.latest
    now = f"{counts.sent - counts.done} in flight"
    if state is not None and state.level is not None:
        now += f" · level {state.level} · queue {state.queued:.0f}"
    if counts.errors:
        now += f" · {counts.errors} errors"
    bar.update(task, completed=counts.done, total=counts.total, now=now, refresh=True)
