"""Open-loop load: each request is sent when it is due, whatever the server does with the ones before it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from morph_client.aio_client import AsyncMorphClient
from morph_client.errors import MorphError
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


@dataclass
class Progress:
    """Counts that a display may read while the run goes on."""

    total: int = 0
    sent: int = 0
    done: int = 0
    errors: int = 0
    output_tokens: int = 0


def plan_requests(requests: Sequence[TraceRequest], maker: PromptMaker) -> list[Planned]:
    """Gives each request of a trace a prompt of its length."""
    return [
        Planned(r.arrival_s, maker.make(r.prompt_tokens, i), r.prompt_tokens, r.output_tokens)
        for i, r in enumerate(requests)
    ]


async def run_load(
    client: AsyncMorphClient,
    plan: Sequence[Planned],
    *,
    progress: Progress | None = None,
    temperature: float = 0.0,
    timeout_s: float | None = None,
    deadline_s: float | None = None,
) -> list[RequestRecord]:
    """Sends the plan, waits for every answer, and returns one record per request, in the plan's order.

    Errors of requests are recorded, not raised. ``timeout_s`` limits each wait in the server's queue, ``deadline_s``
    each request as a whole. If this coroutine is cancelled, so are its requests, on the server too.
    """
    progress = progress or Progress()
    progress.total = len(plan)
    loop = asyncio.get_running_loop()
    start = loop.time()
    tasks: list[asyncio.Task[RequestRecord]] = []
    try:
        for index, item in enumerate(plan):
            # Yields to the loop even when late, so that a burst cannot starve the streams that are being read.
            await asyncio.sleep(max(0.0, start + item.due_s - loop.time()))
            sampling = SamplingParams(
                max_tokens=item.output_tokens,
                min_tokens=item.output_tokens,
                ignore_eos=True,
                temperature=temperature,
                seed=index,
            )
            one = _OneRequest(index, item, loop.time() - start, progress)
            tasks.append(asyncio.create_task(one.run(client, sampling, timeout_s, deadline_s)))
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


class _OneRequest:
    """Sends one request and keeps the few numbers that its record needs."""

    def __init__(self, index: int, item: Planned, sent_s: float, progress: Progress) -> None:
        self._index = index
        self._item = item
        self._sent_s = sent_s
        self._progress = progress
        self._first_s: float | None = None
        self._last: Chunk | None = None
        self._tokens = 0
        self._level0 = 0
        self._max_level = 0

    async def run(
        self,
        client: AsyncMorphClient,
        sampling: SamplingParams,
        timeout_s: float | None,
        deadline_s: float | None,
    ) -> RequestRecord:
        self._progress.sent += 1
        error = None
        try:
            async with client.stream(
                self._item.prompt, sampling=sampling, timeout_s=timeout_s, deadline_s=deadline_s
            ) as chunks:
                async for chunk in chunks:
                    self._take(chunk)
        except MorphError as refusal:
            error = str(refusal)
            self._progress.errors += 1
        self._progress.done += 1
        return self._record(error)

    def _take(self, chunk: Chunk) -> None:
        if self._first_s is None:
            self._first_s = self._sent_s + chunk.arrival_s
        self._last = chunk
        self._tokens += chunk.tokens
        self._level0 += chunk.levels.count(0)
        self._max_level = max(self._max_level, *chunk.levels, 0)
        self._progress.output_tokens += chunk.tokens

    def _record(self, error: str | None) -> RequestRecord:
        last = self._last
        return RequestRecord(
            index=self._index,
            due_s=self._item.due_s,
            sent_s=self._sent_s,
            prompt_tokens=(last.num_input_tokens if last else None) or self._item.prompt_tokens,
            output_tokens=self._tokens,
            first_s=self._first_s,
            last_s=self._sent_s + last.arrival_s if last else None,
            level0_tokens=self._level0,
            max_level=self._max_level,
            rung_share=last.rung_share if last else None,
            error=error,
        )
