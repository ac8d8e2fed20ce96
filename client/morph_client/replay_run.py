"""Runs a replay against a server and gathers what is known of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from morph_client import loadgen
from morph_client.aio_client import AsyncMorphClient
from morph_client.decision_log import from_samples
from morph_client.prompts import measure_tokens_per_word
from morph_client.replay_plan import ReplayPlan
from morph_client.report.data import Run
from morph_client.sampler import Samples, sample_until
from morph_client.state import ServerState
from morph_client.stats import summarise

_SAMPLE_S = 0.25


@dataclass
class ReplayWatch:
    """What a display may read while a replay goes on."""

    counts: loadgen.Progress = field(default_factory=loadgen.Progress)
    samples: Samples = field(default_factory=Samples)
    load_over: bool = False


@dataclass(frozen=True)
class Replayed:
    """A finished replay."""

    run: Run
    requests: list[loadgen.Planned]
    fingerprint: str
    started_unix_s: float


async def prepare(plan: ReplayPlan, client: AsyncMorphClient) -> list[loadgen.Planned]:
    """The requests with prompts of the right length for this server's tokenizer. Raises :class:`MorphError` if it
    cannot be reached."""
    ratio = plan.source.tokens_per_word or await measure_tokens_per_word(client, plan.words)
    return plan.requests(ratio)


async def run_replay(
    plan: ReplayPlan,
    client: AsyncMorphClient,
    requests: list[loadgen.Planned],
    watch: ReplayWatch,
    *,
    label: str | None = None,
    settle_s: float = 0.0,
) -> Replayed:
    """Sends the requests when they are due.

    Args:
        plan: as it was cut.
        client: of the server.
        requests: what :func:`prepare` made of the plan.
        watch: is kept up to date.
        label: the run's name; by default the server's mode.
        settle_s: how long to wait, after the last answer, for the return to level 0.
    """
    stop, returned = asyncio.Event(), asyncio.Event()

    def look(state: ServerState) -> None:
        if watch.load_over and not state.level:
            returned.set()

    started = time.time()
    watcher = asyncio.create_task(
        sample_until(
            stop, watch.samples, metrics_url=client.metrics_url, model=client.model, interval_s=_SAMPLE_S,
            on_sample=look,
        )
    )  # fmt: skip
    try:
        records = await loadgen.run_load(client, requests, progress=watch.counts, options=plan.load_options)
        watch.load_over = True
        await asyncio.wait([back := asyncio.ensure_future(returned.wait())], timeout=settle_s)
        back.cancel()
    finally:
        stop.set()
        await watcher
    state = watch.samples.latest
    mode = (state.mode if state else None) or "unknown"
    run = Run(
        mode=mode,
        label=label or (f"mode {mode}" if state else "replay"),
        records=records,
        summary=summarise(records, plan.targets),
        states=watch.samples.states,
        precision=watch.counts.precision.bins(),
        by_level=watch.counts.precision.by_level,
        changes=from_samples(watch.samples.states),
    )
    return Replayed(run, requests, plan.fingerprint(requests), started)
