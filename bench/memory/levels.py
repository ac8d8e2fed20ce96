"""Resident memory against the budget, level by level, up to the top and back, while requests run.

    python bench/memory/levels.py [--model models/morph-demo] [--kv-tokens 2048] [--out bench/memory/levels.json]

Weights, KV cache, static and free are resident bytes of the arena's address ranges as the kernel counts
them (/proc/self/smaps); "arena" is their sum. "process_data" is what the process holds beyond its size before the
engine was built (arena, workspace, heap) and must not pass the budget; "process_code" is library code that
was paged in meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import SamplingParams, Submit
from morph_runtime.memory.smaps import ProcessMemory, process_memory, rss_by_range

MIB = 2**20
STEPS = 20
"""Per level."""
SPARE_BLOCKS = 8


def reading(engine: Engine, baseline: ProcessMemory) -> dict[str, float]:
    """Mebibytes by use, at the present level."""
    stats = engine.stats()
    arena = engine.parts.arena
    spans = {name: (span.address, span.extents * arena.extent_bytes) for name, span in arena.ranges.items()}
    resident = rss_by_range(spans)
    weights = sum(n for name, n in resident.items() if name.startswith("weights."))
    kv = sum(n for name, n in resident.items() if name.startswith("kv"))
    now = process_memory()
    return {
        "level": stats.level,
        "weights_mib": weights / MIB,
        "kv_mib": kv / MIB,
        "static_mib": resident["static"] / MIB,
        "arena_mib": sum(resident.values()) / MIB,
        "arena_limit_mib": engine.parts.ledger.arena_bytes / MIB,
        "budget_mib": engine.parts.ledger.budget_bytes / MIB,
        "process_data_mib": (now.anonymous + now.shared - baseline.anonymous - baseline.shared) / MIB,
        "process_code_mib": (now.file - baseline.file) / MIB,
        "kv_blocks": stats.kv_blocks_capacity,
        "live_blocks": stats.kv_blocks_used,
    }


def some_request(rng: random.Random) -> Submit:
    """Any prompt length, any output length, top_p sampling: every step has another number of tokens."""
    prompt = [rng.randrange(5, 4000) for _ in range(rng.randint(20, 320))]
    sampling = SamplingParams(max_tokens=rng.randint(8, 80), ignore_eos=True, temperature=0.8, top_p=0.9)
    return Submit(key=rng.getrandbits(60), prompt=prompt, sampling=sampling)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/morph-demo")
    parser.add_argument("--kv-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("bench/memory/levels.json"))
    args = parser.parse_args()
    baseline = process_memory()
    engine = build_engine(
        EngineConfig.from_mapping(
            {"model": {"path": args.model}, "memory": {"kv_tokens": args.kv_tokens}, "morph": {"mode": "off"}}
        )
    )
    rng = random.Random(0)
    top = len(engine.parts.capacities) - 1
    rows = []
    for level in [*range(top + 1), *reversed(range(top))]:
        scheduler, pool = engine.parts.scheduler, engine.parts.pool
        while pool.num_used > engine.parts.capacities[level] - max(SPARE_BLOCKS, scheduler.num_running):
            engine.step(decide=False)  # on the way up: what is live must fit first, and a block for whatever runs
        engine.set_level(level)
        for _ in range(STEPS):
            if engine.parts.scheduler.num_waiting < 4:
                engine.submit(some_request(rng))
            engine.step(decide=False)
        rows.append(reading(engine, baseline))
    engine.close()
    args.out.write_text(json.dumps(rows, indent=2) + "\n")
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{v:.0f}" if isinstance(v, int) else f"{v:.2f}" for v in row.values()) + " |")


if __name__ == "__main__":
    main()
