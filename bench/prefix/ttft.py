"""Time to first token of prompts that begin with the same system prompt, with the prefix cache off and on.

    python bench/prefix/ttft.py [--model models/morph-demo] [--out bench/prefix/results.json]

The engine runs in this process, one request at a time: TTFT is from submission to the step that gives the
first token. The first request of each run fills the cache and is not counted. Off and on take turns, so that
a machine that is busy with other work slows both.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import SamplingParams, Submit


def build(model: str, threads: int, prefix: bool) -> Engine:
    settings = {
        "model": {"path": model},
        "memory": {"kv_tokens": 4096},
        "morph": {"mode": "off"},
        "kernels": {"threads": threads},
        "cache": {"prefix": prefix},
    }
    return build_engine(EngineConfig.from_mapping(settings))


def ttft_ms(engine: Engine, key: int, prompt: list[int]) -> float:
    began = time.perf_counter()
    engine.submit(Submit(key=key, prompt=prompt, sampling=SamplingParams(max_tokens=1, temperature=0.0)))
    while (out := engine.step(decide=False)) is None or not out.tokens:
        pass
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/morph-demo")
    parser.add_argument("--system-tokens", type=int, default=512)
    parser.add_argument("--user-tokens", type=int, default=16)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/prefix/results.json"))
    args = parser.parse_args()
    engines = {"off": build(args.model, args.threads, False), "on": build(args.model, args.threads, True)}
    rng = random.Random(0)
    vocab = engines["on"].parts.spec.vocab
    system = [rng.randrange(10, vocab) for _ in range(args.system_tokens)]
    times: dict[str, list[float]] = {name: [] for name in engines}
    for key in range(args.requests + 1):
        prompt = [*system, *(rng.randrange(10, vocab) for _ in range(args.user_tokens))]
        for name, engine in engines.items():
            times[name].append(ttft_ms(engine, key, prompt))
    stats = engines["on"].stats()
    result = {
        "system_tokens": args.system_tokens,
        "user_tokens": args.user_tokens,
        "requests": args.requests,
        "threads": args.threads,
        "hit_rate": round(stats.prefix_hits / stats.prefix_queries, 4),
    }
    for name, values in times.items():
        counted = sorted(values[1:])
        result[f"{name}_ttft_ms"] = {
            "p50": round(statistics.median(counted), 2),
            "p95": round(counted[round(0.95 * (len(counted) - 1))], 2),
            "min": round(counted[0], 2),
            "first": round(values[0], 2),
        }
    result["speedup_p50"] = round(statistics.median(times["off"][1:]) / statistics.median(times["on"][1:]), 2)
    for engine in engines.values():
        engine.close()
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
