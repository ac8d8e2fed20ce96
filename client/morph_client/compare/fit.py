"""Fits a trace's speed to a machine, so that one command puts the same pressure on any."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from morph_client.aio_client import AsyncMorphClient
from morph_client.errors import BadInput, ServerError
from morph_client.loadgen import LoadOptions, Planned, Progress, run_load
from morph_client.traces import TraceRequest

BUSY_S = 10.0
"""The stretch of the trace that is fitted, in seconds of the trace as it was cut."""

_FILL_S, _COUNT_S = 4.0, 12.0
_ENOUGH = 64
"""Requests that are always under way: more than fit into a small KV cache."""


def busiest_rate(requests: Sequence[TraceRequest]) -> float:
    """Output tokens that the busiest 10 s of a trace ask for, per second."""
    arrivals = [r.arrival_s for r in requests]
    best, first, tokens = 0, 0, 0
    for last, request in enumerate(requests):
        tokens += request.output_tokens
        while arrivals[last] - arrivals[first] >= BUSY_S:
            tokens -= requests[first].output_tokens
            first += 1
        best = max(best, tokens)
    return best / BUSY_S


def fitted_speed(requests: Sequence[TraceRequest], capacity: float, share: float) -> float:
    """The factor that makes the busiest 10 s ask for ``share`` of ``capacity`` output tokens per second, rounded to
    two digits. Raises :class:`BadInput` unless the share is positive.
    """
    if not (math.isfinite(share) and share > 0):
        raise BadInput(f"the share of full precision's capacity to fit to must be positive, not {share:g}")
    return float(f"{share * capacity / busiest_rate(requests):.2g}")


async def output_capacity(client: AsyncMorphClient, requests: Sequence[Planned]) -> float:
    """Output tokens per second that the server makes of these requests when there are always more than it can take.

    Raises :class:`ServerError` if it makes none.
    """
    counts, numbers = Progress(), itertools.count()

    async def one_after_another() -> None:
        while True:
            number = next(numbers)
            request = requests[number % len(requests)]
            fresh = replace(request, due_s=0.0, prompt=f"Fitting {number}. {request.prompt}")
            await run_load(client, [fresh], progress=counts, options=LoadOptions())

    crowd = [asyncio.create_task(one_after_another()) for _ in range(_ENOUGH)]
    clock = asyncio.get_running_loop().time
    try:
        # The first seconds are prefills only; what counts is the steady state after them.
        await asyncio.wait(crowd, timeout=_FILL_S)
        begun, tokens = clock(), counts.output_tokens
        await asyncio.wait(crowd, timeout=_COUNT_S)
        made, seconds = counts.output_tokens - tokens, clock() - begun
    finally:
        for worker in crowd:
            worker.cancel()
        await asyncio.wait(crowd)
    if not made:
        raise ServerError("the server made no tokens while its capacity was measured")
    return made / seconds
