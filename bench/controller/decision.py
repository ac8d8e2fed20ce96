"""What a decision of the controller costs: reading the load, one forecast of all levels, and the rule around it.

    python bench/controller/decision.py [--out bench/controller/results/decision.json]

`read` is `LoadReader.read` on a scheduler with so many running requests and two in line; `forecast` compares four
futures of each level; `decide` is the controller's whole decision with a forecast in it. CPU time of the process, so
that a busy machine adds little: the median of many, and the 95th percentile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from morph_runtime.config import CacheSettings, MorphSettings, SchedulerSettings
from morph_runtime.engine.messages import QueueSignal, SamplingParams
from morph_runtime.kv import BlockPool
from morph_runtime.morph.controller import Controller
from morph_runtime.morph.costs import StepCosts, layer_counts
from morph_runtime.morph.forecast import Forecaster, Futures
from morph_runtime.morph.levels import LevelPlan
from morph_runtime.morph.load import Load, Outer
from morph_runtime.morph.signals import LoadReader
from morph_runtime.scheduler import PrefixCache, Request, Scheduler

BLOCK, PROMPT, BATCH = 16, 512, 8192
TIMES = 200


def make_costs(layers: int, ladder: tuple[str, ...]) -> StepCosts:
    """Made-up costs of the size of an 8B model's on a GPU; what a decision costs does not depend on them."""
    tokens = np.array([1.0, 16, 64, 256, 1024, 4096, 8192])
    curves = [0.008 + tokens * 3e-5, 0.0055 + tokens * 2e-5, 0.004 + tokens * 3.5e-5]
    plan = LevelPlan(range(layers), ladder)  # type: ignore[arg-type]
    whole = np.stack(curves[: len(ladder) + 1])
    return StepCosts(("full", *ladder), tokens, whole, 2e-8, 1e-11, layer_counts(plan), 0.003, 0.008)


def make_load(running: int, pending: int, levels: int) -> tuple[Load, Callable[[], Load]]:
    """A load of decodes, two requests in line and `pending` in the outer queue; and what reads it again."""
    settings = SchedulerSettings(max_num_seqs=max(running, 1) + 8, max_num_batched_tokens=1 << 20)
    pool = BlockPool(running * (PROMPT + 512) // BLOCK + 64)
    scheduler = Scheduler(settings, pool, PrefixCache(CacheSettings(), pool, BLOCK), BLOCK, 1 << 20, ())
    sampling = SamplingParams(max_tokens=512)
    capacities = pool.capacity + 40 * np.arange(levels)
    reader = LoadReader(capacities, settings.max_num_seqs, BATCH, BLOCK)
    for key in range(running):
        request = Request(key, [key % 997] * (PROMPT + key % BLOCK), PROMPT + key % BLOCK, sampling, 0, float(key))
        reader.submitted(request)
        scheduler.add(request)
        plan = scheduler.schedule(0)
        scheduler.advance(plan)
        scheduler.resolve(plan, [1] * sum(part.samples for part in plan.slices), 0)
    line = [7] * (BLOCK * (pool.num_free + 8))
    for key in (running, running + 1):
        scheduler.add(Request(key, line[:], len(line), sampling, 1, float(key)))
    signal = QueueSignal(taken_s=0.0, pending=pending)

    def read() -> Load:
        return reader.read(1.0, 0, pool.num_used, scheduler, signal, 1e9)

    return dataclasses.replace(read(), outer=Outer(pending, 2.0), arrivals_per_s=30.0, mean_arrivals_per_s=20.0), read


def cpu_ms(call: Callable[[], object]) -> tuple[float, float]:
    """Median and 95th percentile of the CPU time of a call, milliseconds."""
    times = []
    for _ in range(TIMES):
        began = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times), sorted(times)[int(0.95 * TIMES)]


def measure(running: int, pending: int, layers: int, ladder: tuple[str, ...]) -> dict[str, float]:
    costs = make_costs(layers, ladder)
    controller = Controller(MorphSettings(), costs.max_level, costs, BATCH)
    forecaster = Forecaster(costs, controller.classes, BATCH)
    count = costs.max_level + 1
    load, read = make_load(running, pending, count)
    futures = Futures(np.tile(np.arange(count), 4), np.ones(4 * count), np.repeat([False, True, True, True], count),
                      np.full(4 * count, 0.7), np.full(4 * count, 0.7))  # fmt: skip
    ticks = iter(range(1_000_000))
    row: dict[str, float] = {"running": running, "pending": pending, "levels": count}
    calls: dict[str, Callable[[], object]] = {
        "read": read,
        "forecast": lambda: forecaster.forecast(load, futures),
        "decide": lambda: controller.decide(dataclasses.replace(load, now_s=float(next(ticks)))),
    }
    for name, call in calls.items():
        median, p95 = cpu_ms(call)
        row |= {f"{name}_ms": round(median, 3), f"{name}_p95_ms": round(p95, 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("bench/controller/results/decision.json"))
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    rows = [
        measure(running, pending, layers, ladder)
        for layers, ladder in ((12, ("w4",)), (32, ("w4",)), (32, ("w8", "w4")))
        for running, pending in ((0, 0), (16, 0), (64, 100), (256, 1000))
    ]
    args.out.write_text(json.dumps({"machine": platform.processor() or platform.machine(), "rows": rows}, indent=1))
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:g}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
