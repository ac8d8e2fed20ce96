"""One trace against one server: what is sent, and the figures of what came back."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine_side import EngineSide
from served import Prompts, Target

from morph_client import loadgen
from morph_client.aio_client import AsyncMorphClient
from morph_client.sampler import Samples, sample_until
from morph_client.server_process import EmbeddedServer
from morph_client.stats import RequestRecord, Targets, summarise
from morph_client.traces import Trace, clip, cut_window, read_trace, speed_up

SLO_S = 2.0
RETURN_LIMIT_S = 15.0
"""How long to watch for the way back to level 0 after the last answer."""
SAMPLE_S = 0.2


def read_load(path: Path, load: Mapping[str, Any], max_model_len: int) -> Trace:
    """The requests of a load.

    Args:
        path: the trace.
        load: `lengths`: (prompt, output) of every request, else as recorded; `keep_every`: of the requests, the first
            of so many; `speed`; `window_s`; `rate`: requests per second at even distances, in place of the
            trace's times.
        max_model_len: tokens of a request; longer prompts are cut.
    """
    trace = read_trace(path)
    trace = speed_up(cut_window(trace, trace.requests[0].arrival_s, load.get("window_s")), load.get("speed", 1.0))
    requests = list(trace.requests[:: load.get("keep_every", 1)])
    if load.get("lengths"):
        prompt, output = load["lengths"]
        requests = [replace(one, prompt_tokens=prompt, output_tokens=output) for one in requests]
    if load.get("rate"):
        count, seconds = len(requests), load["window_s"]
        picked = [requests[at % count] for at in range(round(load["rate"] * seconds))]
        requests = [replace(one, arrival_s=at / load["rate"]) for at, one in enumerate(picked)]
    outputs = [min(one.output_tokens, max_model_len // 4) for one in requests]
    longest = [max_model_len - output - 8 for output in outputs]
    fitted = [
        replace(one, prompt_tokens=min(one.prompt_tokens, most), output_tokens=output)
        for one, most, output in zip(requests, longest, outputs, strict=True)
    ]
    return clip(replace(trace, requests=tuple(fitted)), None, None)


def through_triton(
    server: EmbeddedServer, trace: Trace, prompts: Prompts, deadline_s: float, returns: bool
) -> dict[str, Any]:
    """Replay over gRPC streams, watch the metrics page, and wait for the way back to level 0."""
    samples = Samples()
    began = time.monotonic()
    records, used_s = asyncio.run(_replay(server, trace, prompts, deadline_s, returns, samples))
    server.check_alive()
    states = [
        {
            "at_s": round(one.at_s, 2), "level": one.state.level, "queued": one.state.queued,
            "running": one.state.running, "kv_used": one.state.kv_used, "kv_capacity": one.state.kv_capacity,
            "kv_base": one.state.kv_base, "preemptions": one.state.preemptions,
        }
        for one in samples.states
    ]  # fmt: skip
    wall_s = time.monotonic() - began
    return {**_figures(records), "client_cpu_share": used_s / wall_s, **over_time(states), "states": states}


async def _replay(
    server: EmbeddedServer, trace: Trace, prompts: Prompts, deadline_s: float, returns: bool, samples: Samples
) -> tuple[list[RequestRecord], float]:
    plan = loadgen.plan_requests(trace.requests, prompts.maker)
    stop = asyncio.Event()
    async with AsyncMorphClient(server.grpc_url, metrics_url=server.metrics_url, connections=4) as client:
        watcher = asyncio.create_task(sample_until(stop, samples, metrics_url=server.metrics_url, interval_s=SAMPLE_S))
        used = time.process_time()
        records = await loadgen.run_load(client, plan, options=loadgen.LoadOptions(deadline_s=deadline_s))
        used = time.process_time() - used
        limit = time.monotonic() + (RETURN_LIMIT_S if returns else 0.0)
        while time.monotonic() < limit and (samples.latest is None or samples.latest.level):
            await asyncio.sleep(SAMPLE_S)
        stop.set()
        await watcher
    return records, used


def in_process(engine: EngineSide, trace: Trace, prompts: Prompts, deadline_s: float, returns: bool) -> dict[str, Any]:
    """Replay straight into the engine process."""
    plan = [
        (one.arrival_s, prompts.tokens(one.prompt_tokens, at), one.output_tokens)
        for at, one in enumerate(trace.requests)
    ]
    first = len(engine.states)
    start, heard = engine.run(plan, deadline_s)
    records = [one.record(index, start) for index, one in enumerate(heard)]
    limit = time.monotonic() + (RETURN_LIMIT_S if returns else 0.0)
    while time.monotonic() < limit and engine.states[-1].level:
        time.sleep(SAMPLE_S)
    seen = engine.states[first:]
    base = engine.states[0].kv_blocks_capacity if not engine.states[0].level else None
    states = [
        {
            "at_s": round(one.at_s - start, 2), "level": one.level, "queued": one.waiting, "running": one.running,
            "kv_used": one.kv_blocks_used, "kv_capacity": one.kv_blocks_capacity, "kv_base": base,
            "preemptions": one.preemptions,
        }
        for one in seen
    ]  # fmt: skip
    return {**_figures(records), **over_time(states), "states": states}


def _figures(records: Sequence[RequestRecord]) -> dict[str, Any]:
    summary = summarise(records, Targets(ttft_s=SLO_S))
    tokens = sum(one.output_tokens for one in records)
    return {
        **asdict(summary),
        "over_slo": (summary.slo_violations or 0) / len(records),
        "level0_tokens": sum(one.level0_tokens for one in records) / tokens if tokens else None,
        "requests_detail": [
            [round(one.due_s, 3), one.prompt_tokens, one.output_tokens, one.ttft_s, one.tpot_s, one.max_level]
            for one in records
        ],
    }


def over_time(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Peak of live KV over base capacity, preemptions, level changes, and the way back after the last backlog."""
    if not states:
        return {}
    levels = [one["level"] or 0 for one in states]
    waited = [at for at, one in enumerate(states) if one["queued"]]
    back = None
    if max(levels) and waited:
        # Level 0 from here to the end of what was seen.
        homes = [at for at in range(waited[-1], len(states)) if not any(levels[at:])]
        back = states[homes[0]]["at_s"] - states[waited[-1]]["at_s"] if homes else None
    steps = [b - a for a, b in itertools.pairwise(levels) if b != a]
    peak = max(
        (one["kv_used"] / one["kv_base"] for one in states if one["kv_base"] and one["kv_used"] is not None),
        default=None,
    )
    return {
        "peak_kv_of_base": peak,
        "preemptions": (states[-1]["preemptions"] or 0) - (states[0]["preemptions"] or 0),
        "level_changes": len(steps),
        "reversals": sum((a > 0) != (b > 0) for a, b in itertools.pairwise(steps)),
        "level_peak": max(levels),
        "back_to_level_0_s": back,
        "at_level_0_in_the_end": not levels[-1],
    }


def warm(target: Target, prompts: Prompts, engine: EngineSide) -> None:
    """A short batch, so that the first request measured is not the first of all."""
    engine.batch(prompts, 2, min(64, target.max_model_len // 4), 8, 120.0)
