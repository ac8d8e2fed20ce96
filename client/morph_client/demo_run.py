"""One run of the demo: a server in one mode, a sample answer, the load, and what was seen meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from morph_client import loadgen
from morph_client.aio_client import AsyncMorphClient
from morph_client.decision_log import read_log
from morph_client.demo_load import DemoLoad
from morph_client.prompts import PromptMaker, measure_tokens_per_word, words_of
from morph_client.report.data import Run
from morph_client.sampler import Samples, sample_until
from morph_client.server_process import EmbeddedServer
from morph_client.state import ServerState
from morph_client.stats import RequestRecord, summarise
from morph_client.types import SamplingParams

_SAMPLE_PROMPT = "The old lighthouse keeper climbed the stairs that evening, and"
_SAMPLE_TOKENS = 48
_REQUEST_DEADLINE_S = 180.0
# Long enough to see the layers come back after the load, which is half of the story.
_LONGEST_RETURN_S = 15.0
# How the capacity is measured: this many requests at once, so long until the batch is full, then so long counted.
_CROWD = 60.0
_FILL_S = 2.5
_COUNT_S = 4.0
_LEAST_CAPACITY = 0.2


@dataclass
class Watch:
    """What a display may read while a run goes on."""

    load: DemoLoad
    counts: loadgen.Progress = field(default_factory=loadgen.Progress)
    samples: Samples = field(default_factory=Samples)
    started_at: float | None = None
    """The event loop's clock at the start of the load; ``None`` before."""
    started_unix_s: float = 0.0
    """The same moment in Unix time, which the server's log has."""
    load_over: bool = False
    """True when every answer is there, and only the return to level 0 is awaited."""


async def introduce(server: EmbeddedServer, on_text: Callable[[str], None]) -> None:
    """Streams a sample answer to ``on_text``; warms the server up. Raises :class:`MorphError` if it is refused."""
    async with AsyncMorphClient(server.grpc_url) as client:
        await _sample_answer(client, on_text)


async def serving_capacity(server: EmbeddedServer, load: DemoLoad) -> float:
    """Requests of this load per second that the server completes when there are always more than it can take."""
    counts = loadgen.Progress()
    mean_output = sum(load.output_tokens) / 2
    crowd = replace(load, low_before_s=0.01, low_after_s=0.01, high_s=1.0, high_rate_per_s=_CROWD).requests()
    async with AsyncMorphClient(server.grpc_url) as client:
        maker = await _prompt_maker(client, load)
        plan = [replace(planned, due_s=0.0) for planned in loadgen.plan_requests(crowd, maker)]
        running = asyncio.create_task(loadgen.run_load(client, plan, progress=counts))
        # The first seconds are prefills only; what counts is the steady state after them.
        await asyncio.wait([running], timeout=_FILL_S)
        begun, tokens = asyncio.get_running_loop().time(), counts.output_tokens
        await asyncio.wait([running], timeout=_COUNT_S)
        seconds = asyncio.get_running_loop().time() - begun
        running.cancel()
        await asyncio.wait([running])
        await _until_empty(server)
    server.check_alive()
    return max(_LEAST_CAPACITY, (counts.output_tokens - tokens) / mean_output / max(seconds, 1e-3))


async def _until_empty(server: EmbeddedServer) -> None:
    """Waits, for a while at most, until the server has dropped what was cancelled."""
    stop = asyncio.Event()

    def look(state: ServerState) -> None:
        if not state.kv_used:
            stop.set()

    watcher = sample_until(stop, Samples(), metrics_url=server.metrics_url, model="morph", on_sample=look)
    await asyncio.wait([asyncio.ensure_future(watcher)], timeout=_LONGEST_RETURN_S)


async def measure(
    server: EmbeddedServer, load: DemoLoad, label: str, watch: Watch, *, on_load: Callable[[Watch], None]
) -> Run:
    """Runs the load; ``server`` must be ready and warm.

    ``on_load`` is called when the load begins and about five times a second while it runs. Raises
    :class:`StartFailed` if the server dies under the load.
    """
    async with AsyncMorphClient(server.grpc_url, metrics_url=server.metrics_url) as client:
        plan = loadgen.plan_requests(load.requests(), await _prompt_maker(client, load))
        records = await _run_watched(client, plan, watch, on_load)
    server.check_alive()
    return Run(
        mode=server.mode,
        label=label,
        records=records,
        summary=summarise(records),
        states=watch.samples.states,
        precision=watch.counts.precision.bins(),
        by_level=watch.counts.precision.by_level,
        changes=read_log(server.log_path, watch.started_unix_s),
    )


async def _prompt_maker(client: AsyncMorphClient, load: DemoLoad) -> PromptMaker:
    words = words_of(None)
    return PromptMaker(words, await measure_tokens_per_word(client, words), load.seed)


async def _sample_answer(client: AsyncMorphClient, on_text: Callable[[str], None]) -> None:
    on_text(_SAMPLE_PROMPT)
    sampling = SamplingParams(max_tokens=_SAMPLE_TOKENS, temperature=0.7, top_p=0.9, seed=11)
    async with client.stream(_SAMPLE_PROMPT, sampling=sampling) as chunks:
        async for chunk in chunks:
            on_text(chunk.text)
    on_text("\n")


async def _run_watched(
    client: AsyncMorphClient, plan: list[loadgen.Planned], watch: Watch, on_load: Callable[[Watch], None]
) -> list[RequestRecord]:
    stop, returned = asyncio.Event(), asyncio.Event()

    def look(state: ServerState) -> None:
        if watch.load_over and not state.level:
            returned.set()
        on_load(watch)

    watch.started_at, watch.started_unix_s = asyncio.get_running_loop().time(), time.time()
    watcher = asyncio.create_task(
        sample_until(stop, watch.samples, metrics_url=client.metrics_url, model=client.model, on_sample=look)
    )
    try:
        options = loadgen.LoadOptions(deadline_s=_REQUEST_DEADLINE_S)
        records = await loadgen.run_load(client, plan, progress=watch.counts, options=options)
        watch.load_over = True
        await asyncio.wait([back := asyncio.ensure_future(returned.wait())], timeout=_LONGEST_RETURN_S)
        back.cancel()
        return records
    finally:
        stop.set()
        await watcher
