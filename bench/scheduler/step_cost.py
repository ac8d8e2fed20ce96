"""What a step costs beside the model: schedule, make the batch, advance, resolve; and a reading of the load.

    python bench/scheduler/step_cost.py [--out bench/scheduler/results.json]

No model runs: every request gets a made-up token. Each row has steady decodes of `running` requests and
`waiting` ones that find no room, the head of the line with a prompt whose first 512 tokens
are cached, so that each step looks it up in vain. Milliseconds per step; "read" is the controller's reading, which
happens at most every `morph.interval_s` (50 ms), not in each step. "host" is `Engine.step` as a whole with a runner
that has its result at once, and the encoding of what it publishes: all that the host does for a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from morph_runtime.config import CacheSettings, EngineConfig, SchedulerSettings
from morph_runtime.engine.batch import make_batch
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import SamplingParams, Submit
from morph_runtime.engine.runner import Done, Launched, StepRunner
from morph_runtime.kv import BlockPool
from morph_runtime.models.batch import HostBatch
from morph_runtime.morph.signals import LoadReader
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.sampler import Sampled
from morph_runtime.scheduler import PrefixCache, Request, Scheduler

BLOCK = 16
PROMPT = 512
MODEL = Path(__file__).parents[2] / "models" / "morph-demo"


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


def step(scheduler: Scheduler) -> tuple[float, float, float, float]:
    """Seconds for schedule, make_batch, advance and resolve."""
    began = time.perf_counter()
    plan = scheduler.schedule(0)
    scheduled = time.perf_counter()
    _, sampling = make_batch(plan, BLOCK)
    batched = time.perf_counter()
    scheduler.advance(plan)
    advanced = time.perf_counter()
    scheduler.resolve(plan, [5] * len(sampling), 0)
    return scheduled - began, batched - scheduled, advanced - batched, time.perf_counter() - advanced


@dataclass(frozen=True)
class Fives(StepRunner):
    """Samples the same token everywhere, at no cost."""

    def launch(self, batch: HostBatch, rows: Sequence[SamplingRow], previous: Launched | None) -> Launched:
        return Done(Sampled([5] * len(rows)))


def host(running: int, overlap: str, prefix: bool, steps: int) -> float:
    """Median seconds of `Engine.step` and the encoding of its output, with `running` decodes."""
    config = EngineConfig.from_mapping(
        {
            "model": {"path": str(MODEL)},
            "memory": {"kv_tokens": running * 1024 + 4096},
            "scheduler": {"max_num_seqs": running, "max_num_batched_tokens": 1 << 16},
            "cache": {"prefix": prefix},
            "overlap": overlap,
        }
    )
    engine = build_engine(config)
    engine = Engine(replace(engine.parts, runner=Fives()))
    for key in range(running):
        sampling = SamplingParams(max_tokens=900, ignore_eos=True)
        engine.submit(Submit(key, [key % 500 + 1] * (64 + key % BLOCK), sampling, arrival_s=time.monotonic()))
    engine.step()
    encoder = msgspec.msgpack.Encoder()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        output = engine.step()
        body = encoder.encode(output)
        times.append(time.perf_counter() - began)
    assert output is not None and len(output.tokens) == running and body, "the load must be steady"
    engine.close()
    return statistics.median(times)


def measure(running: int, waiting: int, prefix: bool, steps: int) -> dict[str, float]:
    scheduler, pool = loaded(running, waiting, prefix)
    rounds = [step(scheduler) for _ in range(steps)]
    assert (scheduler.num_running, scheduler.num_waiting) == (running, waiting), "the load must be steady"
    reads = []
    reader = LoadReader((pool.capacity,), running + 1, 512, BLOCK)
    for _ in range(10):
        began = time.perf_counter()
        reader.read(0.0, 0, pool.num_used, scheduler, None, 2.0)
        reads.append(time.perf_counter() - began)
    total = sorted(sum(parts) for parts in rounds)
    schedule, batch, advance, resolve = (statistics.median(parts) for parts in zip(*rounds, strict=True))
    row = {
        "schedule_ms": schedule, "make_batch_ms": batch, "advance_ms": advance, "resolve_ms": resolve,
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
    for row in rows:
        if not row["waiting"]:
            for mode in ("off", "on"):
                seconds = host(int(row["running"]), mode, not args.no_prefix, args.steps)
                row[f"host_overlap_{mode}_ms"] = round(1e3 * seconds, 4)
    args.out.write_text(json.dumps(rows, indent=2) + "\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        values = [row.get(name, "") for name in rows[0]]
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
