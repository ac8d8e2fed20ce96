"""Decode and prefill speed of the engine with all layers at one rung, at several batch sizes.

    python bench/engine/rungs_cpu.py [--model models/morph-demo] [--threads 1] [--out bench/engine/rungs_cpu.json]
    python bench/engine/rungs_cpu.py --kv auto fp8 int8 --prompt 256 --rounds 4 --out bench/kv/speed_cpu.json

Steps of the real engine (scheduler, paged attention, sampling), no server. TPOT is the median step time
with the whole batch decoding. The rungs, and the KV cache types if several are given, are measured in turn, several
rounds, in one process; the best round of each is reported, so that other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import SamplingParams, Submit

BATCHES = (1, 8, 32)
OUTPUT_TOKENS, PREFILL_TOKENS = 48, 512


def decode_ms(engine: Engine, batch: int, prompt_tokens: int, rng: random.Random) -> float:
    """Median milliseconds of a step in which all of `batch` sequences decode."""
    sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, temperature=0.8)
    submit(engine, batch, prompt_tokens, sampling, rng)
    times = []
    while engine.has_requests:
        began = time.perf_counter()
        out = engine.step(decide=False)
        seconds = time.perf_counter() - began
        if out and len(out.tokens) == out.running == batch and not out.started:
            times.append(seconds)
    return statistics.median(times) * 1e3


def prefill_tokens_per_s(engine: Engine, rng: random.Random) -> float:
    """Prompt tokens per second, prompts of 512 tokens one after the other."""
    submit(engine, 6, PREFILL_TOKENS, SamplingParams(max_tokens=1, ignore_eos=True), rng)
    began = time.perf_counter()
    while engine.has_requests:
        engine.step(decide=False)
    return 6 * PREFILL_TOKENS / (time.perf_counter() - began)


def submit(engine: Engine, count: int, tokens: int, sampling: SamplingParams, rng: random.Random) -> None:
    vocab = engine.parts.spec.vocab
    for _ in range(count):
        prompt = [rng.randrange(5, vocab) for _ in range(tokens)]
        engine.submit(Submit(key=rng.getrandbits(60), prompt=prompt, sampling=sampling))


def make_engine(model: str, threads: int, kv: str, prompt_tokens: int) -> Engine:
    return build_engine(
        EngineConfig.from_mapping(
            {
                "model": {"path": model},
                "memory": {"kv_tokens": 32 * (prompt_tokens + OUTPUT_TOKENS + 16), "kv_dtype": kv},
                "scheduler": {"max_num_batched_tokens": 512},
                "cache": {"prefix": False},
                "morph": {"mode": "off", "ladder": ["w8", "w4"]},
                "kernels": {"threads": threads},
            }
        )
    )


def measure(model: str, threads: int, kinds: list[str], prompt_tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Figures by KV type and rung."""
    engines = {kv: make_engine(model, threads, kv, prompt_tokens) for kv in kinds}
    rng = random.Random(0)
    result: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for rung, passes in (("full", 0), ("w8", 1), ("w4", 2)):
            for kv, engine in engines.items():  # next to one another, so that other work meets them alike
                engine.set_level(passes * engine.parts.spec.layers)
                seen = result.setdefault(rung if kv == "auto" else f"{rung}, kv {kv}", {})
                for batch in BATCHES:
                    name = f"tpot_ms_b{batch}"
                    best = decode_ms(engine, batch, prompt_tokens, rng)
                    seen[name] = min(seen.get(name, float("inf")), best)
                seen["prefill_tok_s"] = max(seen.get("prefill_tok_s", 0.0), prefill_tokens_per_s(engine, rng))
                seen["kv_blocks"] = engine.parts.pool.capacity
                seen["weights_mib"] = engine.stats().weights_bytes / 2**20
                seen["arena_mib"] = engine.parts.ledger.arena_bytes / 2**20
    for engine in engines.values():
        engine.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/morph-demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kv", nargs="+", default=["auto"], help="what the KV cache stores: auto, fp8, int8")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt of the decodes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/engine/rungs_cpu.json"))
    args = parser.parse_args()
    figures = measure(args.model, args.threads, args.kv, args.prompt, args.rounds)
    report = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": args.threads}
    args.out.write_text(json.dumps({**report, "prompt_tokens": args.prompt, "rungs": figures}, indent=2) + "\n")
    heads = "".join(f" TPOT B={b} ms | tok/s |" for b in BATCHES)
    print(f"| rung |{heads} prefill tok/s | weights MiB | KV blocks |")
    print("|---|" + "---|" * (2 * len(BATCHES) + 3))
    for rung, seen in figures.items():
        cells = "".join(f" {seen[f'tpot_ms_b{b}']:.2f} | {b / seen[f'tpot_ms_b{b}'] * 1e3:.0f} |" for b in BATCHES)
        rest = f" {seen['prefill_tok_s']:.0f} | {seen['weights_mib']:.2f} | {seen['kv_blocks']:.0f} |"
        print(f"| {rung} |{cells}{rest}")


if __name__ == "__main__":
    main()
