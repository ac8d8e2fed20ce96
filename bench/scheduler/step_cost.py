"""What a step costs beside the model: schedule, make the batch, book the results; and a reading of the load.

    python bench/scheduler/step_cost.py [--out bench/scheduler/results.json]

No model runs: every request gets a made-up token. Each row has steady decodes of `running` requests and
`waiting` ones that find no room, the head of the line with a prompt whose first 512 tokens
are cached, so that each step looks it up in vain. Milliseconds per step; "read" is the controller's reading, which
happens at most every `morph.interval_s` (50 ms), not in each step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from morph_runtime.config import CacheSettings, SchedulerSettings
from morph_runtime.engine.batch import make_batch
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.kv import BlockPool
from morph_runtime.morph.signals import LoadStatistics
from morph_runtime.scheduler import PrefixCache, Request, Scheduler

BLOCK = 16
PROMPT = 512


def loaded(running: int, waiting: int, prefix: bool) -> tuple[Scheduler, BlockPool]:
    """`running` decodes that share a prefix of half their prompt, and a line behind them without room."""
    # One sequence more may run, so that the head of the line is looked up in each step.
    settings = SchedulerSettings(max_num_seqs=running + 1, max_num_batched_tokens=1 << 16)
    pool = BlockPool(running * (PROMPT + 1024) // BLOCK)
    cache = PrefixCache(CacheSettings(prefix=prefix), pool, BLOCK)
    scheduler = Scheduler(settings, pool, cache, BLOCK, 1 << 20, ())
    sampling = SamplingParams(max_tokens=1 << 16)
    for key in range(running):
        # Ends of different lengths, as in service: not all fill a block in the same step.
        scheduler.add(Request(key, [*range(256), *[key] * (256 + key % BLOCK)], 512 + key % BLOCK, sampling, 0, key))
    while scheduler.num_waiting:
        step(scheduler)
    # Too long for the free blocks, but not for free and live ones together; all have the same tokens.
    tokens = [*range(256), *[0] * 256, *[1] * (BLOCK * (pool.num_free + pool.num_used // 2))]
    for key in range(running, running + waiting):
        scheduler.add(Request(key, tokens, len(tokens), sampling, 1, key))
    return scheduler, pool


def step(scheduler: Scheduler) -> tuple[float, float, float]:
    """Seconds for schedule, make_batch and complete."""
    began = time.perf_counter()
    plan = scheduler.schedule(0)
    scheduled = time.perf_counter()
    _, sampling = make_batch(plan, BLOCK)
    sampled = {request.key: 5 for request in sampling}
    batched = time.perf_counter()
    scheduler.complete(plan, sampled, 0)
    return scheduled - began, batched - scheduled, time.perf_counter() - batched


def measure(running: int, waiting: int, prefix: bool, steps: int) -> dict[str, float]:
    scheduler, pool = loaded(running, waiting, prefix)
    rounds = [step(scheduler) for _ in range(steps)]
    assert (scheduler.num_running, scheduler.num_waiting) == (running, waiting), "the load must be steady"
    reads = []
    statistics_ = LoadStatistics()
    for _ in range(10):
        began = time.perf_counter()
        statistics_.read(0.0, 0, (pool.capacity,), pool.num_used, running + 1, scheduler, None)
        reads.append(time.perf_counter() - began)
    total = sorted(sum(parts) for parts in rounds)
    schedule, batch, complete = (statistics.median(parts) for parts in zip(*rounds, strict=True))
    row = {
        "schedule_ms": schedule, "make_batch_ms": batch, "complete_ms": complete,
        "step_p50_ms": statistics.median(total), "step_p95_ms": total[int(0.95 * len(total))],
        "read_ms": statistics.median(reads),
    }  # fmt: skip
    return {"running": running, "waiting": waiting, **{name: round(1e3 * value, 4) for name, value in row.items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--no-prefix", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench/scheduler/results.json"))
    args = parser.parse_args()
    cases = [(n, 0) for n in (1, 16, 64, 256, 512, 1024)] + [(256, n) for n in (1, 64, 256, 1024)]
    rows = [measure(running, waiting, not args.no_prefix, args.steps) for running, waiting in cases]
    args.out.write_text(json.dumps(rows, indent=2) + "\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
