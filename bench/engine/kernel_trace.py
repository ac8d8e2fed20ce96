"""What the GPU ran and when: idle time between steps, and what layers that change take on a stream of their own."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from operator import itemgetter
from typing import Any

import torch
from bench_setup import Bench
from engine_driver import Company, Driver

Event = tuple[float, float, int, str]
"""Start us, duration us, stream, name."""


def kernels_of(driver: Driver, steps: int) -> list[Event]:
    """What the GPU ran during some steps, by start; on a CPU the operators."""
    on_gpu = driver.engine.parts.config.device == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        for _ in range(steps):
            driver.step()
        if on_gpu:
            torch.cuda.synchronize()
    events = [
        (event.start_ns() / 1e3, event.duration_ns() / 1e3, int(event.device_resource_id()), event.name()[:48])
        for event in profile.profiler.kineto_results.events()
        if ("CUDA" in str(event.device_type())) == on_gpu
    ]
    return sorted(events)


def idle(events: list[Event]) -> float:
    """The share of time in which nothing ran, from the end of the second step on: a profile begins with a pause."""
    ends = [i for i, event in enumerate(events) if "DtoH" in event[3]]
    events = events[ends[1] if len(ends) > 1 else 0 :]
    first = end = events[0][0]
    busy = 0.0
    for start, duration, *_ in events:
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return 1 - busy / (end - first)


def between(events: list[Event]) -> float:
    """The share of time in which nothing ran from the last kernel of a step to the first of the next layer's.

    A step ends with the copy of its tokens to the host; the next one fetches its inputs and embeds its tokens.
    """
    streams = Counter(event[2] for event in events)
    steps = [event for event in events if event[2] == max(streams, key=lambda stream: streams[stream])]
    ends = [i for i, event in enumerate(steps) if "DtoH" in event[3]][1:]
    if len(ends) < 2:
        return 0.0
    gaps = [max(0.0, b[0] - a[0] - a[1]) for a, b in itertools.pairwise(steps)]
    # The gap before the copy, behind it, behind the two fetches, and behind the embedding.
    idle_us = sum(sum(gaps[max(i - 1, 0) : i + 4]) for i in ends[:-1])
    return idle_us / (steps[ends[-1]][0] - steps[ends[0]][0])


def side_ms(events: list[Event]) -> float:
    """Milliseconds of work on all streams but that of the steps."""
    streams = Counter(event[2] for event in events)
    steps = max(streams, key=lambda stream: streams[stream])
    return sum(event[1] for event in events if event[2] != steps) / 1e3


def by_kernel(events: list[Event], steps: int) -> dict[str, list[float]]:
    """The kernels that take most: calls and us in a step."""
    total: dict[str, float] = defaultdict(float)
    calls = Counter(event[3] for event in events)
    for _, duration, _, name in events:
        total[name] += duration
    return {name: [calls[name] / steps, us / steps] for name, us in sorted(total.items(), key=itemgetter(1))[-16:]}


def trace(bench: Bench, layers_down: int = 4) -> dict[str, Any]:
    """GPU idle time of plain decode at each rung, and what ran on which stream while layers went down and up again."""
    scale, engine, steps = bench.scale, bench.engine, 20
    result: dict[str, Any] = {"idle": {}, "between": {}, "kernels": {}}
    for rung, level in reversed({"full": 0, **bench.levels}.items()):  # full precision last: from there it goes down
        bench.driver.clear()
        engine.set_level(level)
        company = Company(bench.driver, scale.batch, scale.prompt, 120)
        company.ensure(50)
        events = kernels_of(bench.driver, steps)
        result["idle"][rung], result["between"][rung] = idle(events), between(events)
        result["kernels"][rung] = by_kernel(events, steps)
    engine.parts.shifter.target = min(layers_down, bench.layers)
    down = kernels_of(bench.driver, 6)
    engine.parts.shifter.target = 0
    up = kernels_of(bench.driver, 12)
    bench.driver.clear()
    engine.set_level(0)
    return {**result, "down_side_ms": side_ms(down), "down": down, "up": up}
