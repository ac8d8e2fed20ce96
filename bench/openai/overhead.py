"""What `morph openai` costs over direct gRPC: the same streams by both ways, in turns.

    python bench/openai/overhead.py --url localhost:8001 --openai-url http://localhost:9000 --out result.json

Both servers must be running. Both ways are asked from this one process, so its own work counts in both. With
`--endpoint-pid` the processor time of the endpoint, its workers included, is read too: other work on the machine
changes that least of all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from morph_client import AsyncMorphClient, SamplingParams

PROMPT = "It was a dark night, and the captain looked at the sea for a long while. "


@dataclass(frozen=True)
class Round:
    """One round: so many clients, each asking again when it has its answer; their beginnings are spread."""

    way: str
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    endpoint_cpu_us_per_token: float | None
    """Processor time of the endpoint; only by the way through it, and if its process id is known."""


async def by_grpc(client: AsyncMorphClient, tokens: int) -> tuple[float, int]:
    """One stream; seconds to its first token, and its tokens."""
    began, first, count = time.perf_counter(), 0.0, 0
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
    async with client.stream(PROMPT, sampling=sampling, details=False) as chunks:
        async for chunk in chunks:
            first = first or time.perf_counter() - began
            count += chunk.tokens
    return first, count


async def by_openai(client: httpx.AsyncClient, tokens: int) -> tuple[float, int]:
    """The same through the endpoint; tokens are counted by the usage at the end."""
    body = {"model": "morph", "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, first, last = time.perf_counter(), 0.0, ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                last = line
    return first, int(json.loads(last[6:])["usage"]["completion_tokens"])


Ask = Callable[[], Awaitable[tuple[float, int]]]


def cpu_seconds(pid: int | None) -> float:
    """Processor time of a process and those it has started, so far; 0 without one."""
    if pid is None:
        return 0.0
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


async def one_round(way: str, ask: Ask, given: argparse.Namespace) -> Round:
    """All clients of one round."""
    streams, requests, spread_s = given.streams, given.requests, given.spread
    pid = given.endpoint_pid if way == "openai" else None
    firsts: list[float] = []

    async def client(number: int) -> int:
        await asyncio.sleep(spread_s * number / streams)
        count = 0
        for _ in range(requests):
            first, tokens = await ask()
            firsts.append(first)
            count += tokens
        return count

    began, spent = time.perf_counter(), cpu_seconds(pid)
    total = sum(await asyncio.gather(*(client(number) for number in range(streams))))
    took = time.perf_counter() - began
    firsts.sort()
    p95 = firsts[int(0.95 * (len(firsts) - 1))]
    cpu_us = None if pid is None else (cpu_seconds(pid) - spent) / total * 1e6
    return Round(way, total / took, statistics.median(firsts) * 1e3, p95 * 1e3, cpu_us)


async def measure(given: argparse.Namespace) -> list[Round]:
    """Rounds by both ways in turns, after one of each that does not count."""
    found = []
    limits = httpx.Limits(max_connections=given.streams, max_keepalive_connections=given.streams)
    async with (
        AsyncMorphClient(given.url, connections=4) as direct,
        httpx.AsyncClient(base_url=given.openai_url, limits=limits, timeout=600) as http,
    ):
        asks: dict[str, Ask] = {
            "grpc": lambda: by_grpc(direct, given.tokens),
            "openai": lambda: by_openai(http, given.tokens),
        }
        for number in range(given.rounds + 1):
            for way in sorted(asks, reverse=bool(number % 2)):
                result = await one_round(way, asks[way], given)
                if number:
                    found.append(result)
    return found


def summary(rounds: list[Round]) -> dict[str, float | None]:
    """Medians of the rounds, and what the endpoint costs."""
    of = {way: [r for r in rounds if r.way == way] for way in ("grpc", "openai")}
    rate = {way: statistics.median(r.tokens_per_s for r in found) for way, found in of.items()}
    first = {way: statistics.median(r.ttft_p50_ms for r in found) for way, found in of.items()}
    cpu = [r.endpoint_cpu_us_per_token for r in of["openai"] if r.endpoint_cpu_us_per_token is not None]
    return {
        "grpc_tokens_per_s": round(rate["grpc"], 1),
        "openai_tokens_per_s": round(rate["openai"], 1),
        "tokens_per_s_lost_percent": round(100 * (1 - rate["openai"] / rate["grpc"]), 2),
        "grpc_ttft_p50_ms": round(first["grpc"], 2),
        "openai_ttft_p50_ms": round(first["openai"], 2),
        "ttft_p50_added_ms": round(first["openai"] - first["grpc"], 2),
        "endpoint_cpu_us_per_token": round(statistics.median(cpu), 1) if cpu else None,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="The cost of morph openai over direct gRPC.")
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--openai-url", default="http://localhost:9000")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=3, help="of each stream, one after the other")
    parser.add_argument("--spread", type=float, default=6.0, help="seconds over which the streams begin")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--endpoint-pid", type=int, help="of morph openai, on this machine")
    parser.add_argument("--note", default="", help="what machine and which server this was")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rounds = asyncio.run(measure(given))
    names = ("streams", "tokens", "requests", "spread", "note")
    setting = {"cpus": os.cpu_count(), **{name: getattr(given, name) for name in names}}
    result = {"setting": setting, "summary": summary(rounds), "rounds": [asdict(r) for r in rounds]}
    print(json.dumps(result["summary"], indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
