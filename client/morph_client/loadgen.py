"""Open-loop load: each request is sent when it is due, whatever the server does with the ones before it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from morph_client.aio_client import AsyncMorphClient
from morph_client.errors import MorphError
from morph_client.precision import PrecisionClock
from morph_client.prompts import PromptMaker
from morph_client.stats import RequestRecord
from morph_client.traces import TraceRequest
from morph_client.types import Chunk, SamplingParams


@dataclass(frozen=True)
class Planned:
    """One request of the plan; ``due_s`` counts from the start of the run."""

    due_s: float
    prompt: str
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    slo_class: str | None = None


@dataclass
class Progress:
    """Counts that a display may read while the run goes on."""

    total: int = 0
    sent: int = 0
    done: int = 0
    errors: int = 0
    output_tokens: int = 0
    precision: PrecisionClock = field(default_factory=PrecisionClock)


def plan_requests(requests: Sequence[TraceRequest], maker: PromptMaker) -> list[Planned]:
    """Gives each request of a trace a prompt of its length."""
    return [
        Planned(r.arrival_s, maker.make(r.prompt_tokens, i), r.prompt_tokens, r.output_tokens, r.priority, r.slo_class)
        for i, r in enumerate(requests)
    ]


@dataclass(frozen=True)
class LoadOptions:
    """What all requests of a load have in common. Times in seconds."""

    temperature: float = 0.0
    seed: int = 0
    """The request of index i draws its tokens with ``seed`` + i."""
    timeout_s: float | None = None
    """Limit of each wait in the server's queue."""
    deadline_s: float | None = None
    """Limit of each request as a whole."""
    keep_text: bool = False
    """Whether records hold the outputs."""


async def run_load(
    client: AsyncMorphClient,
    plan: Sequence[Planned],
    *,
    progress: Progress | None = None,
    options: LoadOptions | None = None,
) -> list[RequestRecord]:
    """Sends the plan, waits for every answer, and returns one record per request, in the plan's order.

    Errors of requests are recorded, not raised. If this coroutine is cancelled, so are its requests, on the server too.
    """
    progress, options = progress or Progress(), options or LoadOptions()
    progress.total = len(plan)
    loop = asyncio.get_running_loop()
    start = loop.time()
    tasks: list[asyncio.Task[RequestRecord]] = []
    try:
        for index, item in enumerate(plan):
            # Yields to the loop even when late, so that a burst cannot starve the streams that are being read.
            await asyncio.sleep(max(0.0, start + item.due_s - loop.time()))
            one = _OneRequest(index, item, loop.time() - start, progress, options)
            tasks.append(asyncio.create_task(one.run(client)))
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


class _OneRequest:
    """Sends one request and keeps the few numbers that its record needs."""

    def __init__(self, index: int, item: Planned, sent_s: float, progress: Progress, options: LoadOptions) -> None:
        self._index = index
        self._item = item
        self._sent_s = sent_s
        self._progress = progress
        self._options = options
        self._first_s: float | None = None
        self._last: Chunk | None = None
        self._prompt_tokens = item.prompt_tokens
        self._tokens = 0
        self._level0 = 0
        self._max_level = 0
        self._gaps: list[float] = []
        self._text: list[str] = []

    async def run(self, client: AsyncMorphClient) -> RequestRecord:
        self._progress.sent += 1
        error = None
        item, options = self._item, self._options
        sampling = SamplingParams(
            max_tokens=item.output_tokens,
            # Enough to fix the length; min_tokens would ban tokens, and on a GPU such rows are sampled on the host.
            ignore_eos=True,
            temperature=options.temperature,
            seed=options.seed + self._index,
        )
        try:
            async with client.stream(
                item.prompt,
                sampling=sampling,
                priority=item.priority,
                slo_class=item.slo_class,
                timeout_s=options.timeout_s,
                deadline_s=options.deadline_s,
            ) as chunks:
                async for chunk in chunks:
                    self._take(chunk)
        except MorphError as refusal:
            error = str(refusal)
            self._progress.errors += 1
        self._progress.done += 1
        return self._record(error)

    def _take(self, chunk: Chunk) -> None:
        at_s, last = self._sent_s + chunk.arrival_s, self._last
        if self._first_s is None:
            self._first_s = at_s
        elif last is not None and chunk.tokens:
            self._gaps.append(chunk.arrival_s - last.arrival_s)
        self._progress.precision.add(at_s, chunk, last.rung_share if last else None, self._tokens)
        self._last = chunk
        self._prompt_tokens = chunk.num_input_tokens or self._prompt_tokens
        self._tokens += chunk.tokens
        self._level0 += chunk.levels.count(0)
        self._max_level = max(self._max_level, *chunk.levels, 0)
        self._progress.output_tokens += chunk.tokens
        if self._options.keep_text:
            self._text.append(chunk.text)

    def _record(self, error: str | None) -> RequestRecord:
        last = self._last
        return RequestRecord(
            index=self._index,
            due_s=self._item.due_s,
            sent_s=self._sent_s,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._tokens,
            first_s=self._first_s,
            last_s=self._sent_s + last.arrival_s if last else None,
            level0_tokens=self._level0,
            max_level=self._max_level,
            rung_share=last.rung_share if last else None,
            error=error,
            gaps_s=tuple(self._gaps),
            text="".join(self._text) if self._options.keep_text else None,
            slo_class=self._item.slo_class,
        )
