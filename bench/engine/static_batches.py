"""Phases in which the level stays: decode, long contexts, prefill, mixed steps, sampling, overlap."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

from bench_setup import Bench
from engine_driver import Driver, gaps_ms, spread
from long_contexts import filling

from morph_runtime.engine.core import Engine
from morph_runtime.sampling.shape import MOST_ENTRIES

Row = dict[str, Any]


def batch_row(driver: Driver, batch: int, prompt: int, output: int, **choice: Any) -> Row:
    """A static batch: inter-token latency while all of it decodes."""
    preempted = driver.engine.parts.scheduler.preemptions
    for _ in range(batch):
        driver.submit(prompt, output, **choice)
    gaps = gaps_ms(driver.together(batch))[2:]
    figures = spread(gaps)
    return {
        "batch": batch, "prompt": prompt, "output": output, "itl_p50_ms": figures["p50_ms"],
        "itl_p99_ms": figures["p99_ms"], "tok_s": batch * len(gaps) / (sum(gaps) / 1e3), "steps": len(gaps),
        "preemptions": driver.engine.parts.scheduler.preemptions - preempted,
    }  # fmt: skip


def decode(bench: Bench, rung: str) -> list[Row]:
    """Static batches of short contexts."""
    scale, rows = bench.scale, []
    for batch in scale.batches:
        if batch * (scale.prompt + scale.output // 2) > bench.driver.kv_tokens:
            print(rung, f"decode of {batch}: the KV cache is too small", flush=True)
            continue
        row = batch_row(bench.driver, batch, scale.prompt, scale.output if batch < 256 else scale.output - 16)
        read = batch * (row["prompt"] + row["output"] / 2)
        rows.append(row | bench.roofline.against(row["itl_p50_ms"], rung, batch, batch, read, read))
    return rows


def full(bench: Bench, rung: str) -> list[Row]:
    """Decode with 90 % of the KV cache in use."""
    rows = []
    tokens = bench.driver.kv_tokens
    for batch, prompt, output in filling(tokens, bench.scale.full_batches, bench.longest, bench.step_tokens):
        row = batch_row(bench.driver, batch, prompt, output)
        read = batch * (prompt + output / 2)
        row["kv_share"] = read / tokens
        rows.append(row | bench.roofline.against(row["itl_p50_ms"], rung, batch, batch, read, read))
    if not rows:
        raise RuntimeError(f"no batch of long contexts fills a KV cache of {tokens} tokens")
    return rows


def prefill(bench: Bench, rung: str) -> list[Row]:
    """Time to the only token of a prompt, one request at a time."""
    rows = []
    for tokens in sorted({min(n, bench.longest - 8) for n in bench.scale.prompts}):
        times = []
        for _ in range(12 if tokens < 1024 else 6 if tokens < 4096 else 4):
            bench.driver.submit(tokens, 1)
            began = time.monotonic()
            bench.driver.run()
            times.append((time.monotonic() - began) * 1e3)
        ms = statistics.median(times[1:])
        pairs = tokens * (tokens + 1) / 2
        chunks = -(-tokens // bench.step_tokens)
        figures = bench.roofline.against(ms, rung, tokens, 1, tokens * (chunks - 1) / 2, pairs)
        rows.append({"tokens": tokens, "ms": ms, "min_ms": min(times[1:]), "tok_s": tokens / ms * 1e3, **figures})
    return rows


def mixed(bench: Bench, rung: str) -> Row:
    """Steps of some decodes, and of chunks of long prompts that fill them up."""
    driver, scale = bench.driver, bench.scale
    batch, chunk = scale.mixed_decodes, bench.step_tokens - scale.mixed_decodes
    prompt = min(8184, bench.longest - 8)
    for _ in range(batch):
        driver.submit(16, scale.mixed_steps + prompt // chunk + 40)
    steps = driver.steps()
    for _, count in steps:
        if count == batch:
            break
    for _ in range(-(-scale.mixed_steps * chunk // prompt) + 1):
        driver.submit(prompt, 1)
    # The step after the present one is the first with a chunk; with overlap it has been scheduled without.
    seen = [next(steps) for _ in range(scale.mixed_steps + 3)][2:]
    waiting = len(driver.running) - batch
    driver.clear()
    if waiting < 1:
        raise RuntimeError("the long prompts ended before the measurement")
    gaps = gaps_ms(seen)
    ms = statistics.median(gaps)
    context = prompt / 2
    figures = bench.roofline.against(ms, rung, bench.step_tokens, batch, batch * 40 + context, chunk * context)
    return {
        "prefill": chunk, "decodes": batch, "prompt": prompt, "ms": ms, "mean_ms": statistics.mean(gaps),
        "max_ms": max(gaps), "steps": len(gaps), "tok_s": bench.step_tokens / statistics.mean(gaps) * 1e3, **figures,
    }  # fmt: skip


def sampled(bench: Bench) -> dict[str, Row]:
    """Plain rows; rows that the GPU shapes before it draws; rows of the host's sampler, which waits for it."""
    bench.engine.set_level(0)
    scale = bench.scale
    drawn, least = {"temperature": 1.0}, {"min_tokens": scale.output // 2, "stop_token_ids": (5,)}
    choices: dict[str, dict[str, Any]] = {
        "greedy": {}, "temperature": drawn, "top_p": drawn | {"top_p": 0.9}, "top_k": drawn | {"top_k": 50},
        "min_p": drawn | {"min_p": 0.05}, "min_tokens": least, "both": drawn | {"top_p": 0.9, "top_k": 50},
        "all": drawn | least | {"top_p": 0.9, "top_k": 50, "logit_bias": ((17, 1.5), (23, -100.0))},
        "host": drawn | {"top_p": 0.9, "logit_bias": tuple((token, 0.1) for token in range(MOST_ENTRIES + 1))},
    }  # fmt: skip
    return {
        name: batch_row(bench.driver, scale.batch, scale.prompt, scale.output // 2, **choice)
        for name, choice in choices.items()
    }


def overlap(bench: Bench) -> list[Row]:
    """Full precision, with the next step scheduled while one runs and without: the same engine, two orders."""
    bench.engine.set_level(0)
    parts, rows = bench.engine.parts, []
    try:
        for setting in ("on", "off"):
            engine = Engine(replace(parts, config=replace(parts.config, overlap=setting)))
            driver = Driver(engine)
            try:
                for batch in bench.scale.batches_plain:
                    row = batch_row(driver, batch, bench.scale.prompt, bench.scale.output // 2)
                    rows.append({"overlap": setting, "graphs": parts.config.kernels.graphs, **row})
            finally:
                driver.clear()
    finally:
        parts.shifter.before_change(bench.engine.settle)
    return rows
