"""The engine on a GPU with a real model's shape: decode, prefill, capacity and shifts, at each rung.

    python bench/engine/gpu.py --shape llama-3-8b --budget 24 [--phases decode,prefill,shift] [--out FILE]

In this process, without Triton; random weights; prefix cache off. Static batches of 128 prompt and 128 output tokens,
as bench/engine/README.md says. Prints one line per measurement; writes all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import itertools

from random_model import SHAPES, write_folder

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import SamplingParams, Submit


class Driver:
    """Feeds one engine."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
        self._key = 0
        self._random = random.Random(seed)

    def submit(self, prompt_len: int, output_len: int, **choice: float) -> int:
        """One request of random tokens that runs to its limit; greedy unless `choice` (SamplingParams) says else."""
        self._key += 1
        prompt = [self._random.randrange(self.engine.parts.spec.vocab) for _ in range(prompt_len)]
        sampling = SamplingParams(**{"temperature": 0.0, **choice}, max_tokens=output_len, ignore_eos=True)  # type: ignore[arg-type]
        self.engine.submit(Submit(key=self._key, prompt=prompt, sampling=sampling, arrival_s=time.monotonic()))
        return self._key

    def run(self, until_tokens: int = 0) -> list[tuple[float, int]]:
        """Step to the end, or until so many tokens came: (time, tokens) of every step that gave any."""
        seen, total = [], 0
        while self.engine.has_requests:
            out = self.engine.step(decide=False)
            count = sum(len(delta.tokens) for delta in out.tokens) if out else 0
            if count:
                seen.append((time.monotonic(), count))
                total += count
            if until_tokens and total >= until_tokens:
                break
        return seen


def quantile(values: list[float], q: float) -> float:
    """The q-quantile of unsorted values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def decode(driver: Driver, batch: int, prompt: int, output: int, **choice: float) -> dict[str, float]:
    """A static batch: inter-token latency while all of it decodes."""
    for _ in range(batch):
        driver.submit(prompt, output, **choice)
    steps = driver.run()
    full = [(at, n) for at, n in steps if n == batch]
    gaps = [(b[0] - a[0]) * 1e3 for a, b in itertools.pairwise(full)][2:]
    return {
        "batch": batch, "itl_p50_ms": statistics.median(gaps), "itl_p99_ms": quantile(gaps, 0.99),
        "tok_s": batch * len(gaps) / (sum(gaps) / 1e3),
    }  # fmt: skip


def prefill(driver: Driver, tokens: int, repeat: int = 5) -> dict[str, float]:
    """Time to the only token of a prompt, one request at a time."""
    times = []
    for _ in range(repeat):
        driver.submit(tokens, 1)
        began = time.monotonic()
        driver.run()
        times.append(time.monotonic() - began)
    best = statistics.median(times[1:])
    return {"tokens": tokens, "ms": best * 1e3, "tok_s": tokens / best}


def shift(driver: Driver, target: int, batch: int = 64) -> dict[str, Any]:
    """Walk to a level while a batch decodes."""
    engine = driver.engine
    for _ in range(batch):
        driver.submit(128, 400)
    driver.run(until_tokens=batch * 60)
    start, began = engine.level, time.monotonic()
    engine.parts.shifter.target = target
    gaps, last, flipped, settled, polls = [], began, 0.0, 0.0, []
    while engine.has_requests:
        out = engine.step(decide=False)
        now = time.monotonic()
        if out and out.tokens:
            gaps.append((now - last) * 1e3)
            last = now
        polls.append(engine.level)
        if not flipped and engine.level == target:
            flipped = now - began
        if not settled and engine.level == target and not engine.parts.shifter.busy:
            settled = now - began
            break
    during = list(gaps)
    rest = driver.run()
    after = [(b[0] - a[0]) * 1e3 for a, b in itertools.pairwise(rest) if b[1] == batch]
    return {
        "from": start, "to": target, "flipped_ms": flipped * 1e3, "settled_ms": settled * 1e3, "steps": len(during),
        "itl_max_ms": max(during), "itl_p50_ms": statistics.median(during),
        "after_p50_ms": statistics.median(after) if after else 0.0, "levels": polls[:40],
    }  # fmt: skip


def paced(driver: Driver, first: int, every_steps: int, batch: int = 64) -> dict[str, Any]:
    """Shift a layer every few steps, down and up again in turns, and compare with the same batch left alone."""
    engine = driver.engine

    def run(shifting: bool) -> tuple[list[float], float, int]:
        for _ in range(batch):
            driver.submit(128, 420)
        driver.run(until_tokens=batch * 20)
        gaps, last, began, count = [], time.monotonic(), time.monotonic(), 0
        while engine.has_requests and len(gaps) < 380:
            if shifting and len(gaps) % every_steps == 0:
                level = engine.level
                engine.parts.shifter.target = level + (1 if count % 20 < 10 else -1)
                count += 1
            out = engine.step(decide=False)
            now = time.monotonic()
            if out and out.tokens:
                gaps.append((now - last) * 1e3)
                last = now
        seconds = time.monotonic() - began
        driver.run()
        engine.set_level(first)
        return gaps[2:], seconds, count

    engine.set_level(first + 5)
    alone, _, _ = run(False)
    moved, seconds, count = run(True)
    return {
        "layers_per_s": count / seconds, "p50_ms": statistics.median(moved), "p99_ms": quantile(moved, 0.99),
        "max_ms": max(moved), "alone_p50_ms": statistics.median(alone), "alone_p99_ms": quantile(alone, 0.99),
        "alone_max_ms": max(alone),
    }  # fmt: skip


def kernels_of(engine: Engine, steps: int) -> list[tuple[float, float, int, str]]:
    """What the GPU ran during some steps: (start us, duration us, stream, name), by start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            engine.step(decide=False)
        torch.cuda.synchronize()
    events = [
        (event.start_ns() / 1e3, event.duration_ns() / 1e3, int(event.device_resource_id()), event.name()[:48])
        for event in profile.profiler.kineto_results.events()
        if "CUDA" in str(event.device_type())
    ]
    return sorted(events)


def idle(events: list[tuple[float, float, int, str]]) -> float:
    """The share of time in which nothing ran, from the end of the second step on: a profile begins with a pause."""
    ends = [i for i, event in enumerate(events) if "DtoH" in event[3]]
    events = events[ends[1] :]
    first = end = events[0][0]
    busy = 0.0
    for start, duration, *_ in events:
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return 1 - busy / (end - first)


def trace(driver: Driver, layers_down: int, batch: int = 64) -> dict[str, Any]:
    """GPU idle time of plain decode, and what ran on which stream while some layers went down and up again."""
    engine = driver.engine
    for _ in range(batch):
        driver.submit(128, 200)
    driver.run(until_tokens=batch * 30)
    alone = idle(kernels_of(engine, 20))
    engine.parts.shifter.target = layers_down
    down = kernels_of(engine, 6)
    engine.parts.shifter.target = 0
    up = kernels_of(engine, 12)
    driver.run()
    engine.set_level(0)
    return {"idle_share": alone, "down": down, "up": up}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--budget", type=float, default=24.0, help="GiB")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--ladder", default="w8,w4")
    parser.add_argument("--phases", default="decode,prefill,sampled,shift,paced,trace")
    parser.add_argument("--batches", default="1,8,32,64,128,256")
    parser.add_argument("--rungs", default="full,w8,w4")
    parser.add_argument("--set", action="append", default=[], help="section.field=value, JSON")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = write_folder(given.shape, Path(tempfile.mkdtemp()))
    settings: dict[str, Any] = {
        "device": "cuda", "model": {"path": str(folder), "dtype": "bfloat16", "max_model_len": given.max_model_len,
                                    "load_format": "dummy"},
        "memory": {"budget_gib": given.budget}, "cache": {"prefix": False},
        "scheduler": {"max_num_seqs": 256, "max_num_batched_tokens": 2048},
        "morph": {"mode": "off", "ladder": given.ladder.split(","), "costs": "off"},
    }  # fmt: skip
    for item in given.set:
        name, value = item.split("=", 1)
        *section, field = name.split(".")
        (settings.setdefault(section[0], {}) if section else settings)[field] = json.loads(value)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.monotonic()
    engine = build_engine(EngineConfig.from_mapping(settings))
    driver, parts = Driver(engine), engine.parts
    layers = parts.spec.layers
    result: dict[str, Any] = {"shape": given.shape, "gpu": torch.cuda.get_device_name(), "settings": settings}
    result["start_s"] = time.monotonic() - began
    result["ledger"] = parts.ledger.describe()
    result["kv_tokens"] = {level: parts.capacities[level] * 16 for level in range(0, len(parts.capacities), layers)}
    result["kernels"] = {rung: parts.swapper._slots.kernel_names(rung) for rung in parts.swapper._slots.rungs}
    print(json.dumps(result), flush=True)
    levels = {"full": 0, **{rung: layers * (i + 1) for i, rung in enumerate(given.ladder.split(","))}}
    for rung in given.rungs.split(","):
        engine.set_level(levels[rung])
        rows = result.setdefault(rung, {"decode": [], "prefill": []})
        if "decode" in given.phases:
            decode(driver, 8, 128, 16)
            for batch in map(int, given.batches.split(",")):
                rows["decode"].append(decode(driver, batch, 128, 128 if batch < 256 else 112))
                print(rung, json.dumps(rows["decode"][-1]), flush=True)
        if "prefill" in given.phases:
            for tokens in sorted({min(n, given.max_model_len - 8) for n in (2048, 8192)}):
                rows["prefill"].append(prefill(driver, tokens))
                print(rung, json.dumps(rows["prefill"][-1]), flush=True)
    if "sampled" in given.phases:  # drawn on the GPU; by the host's sampler, which waits for it
        engine.set_level(0)
        choices: dict[str, dict[str, float]] = {
            "temperature": {"temperature": 1.0}, "top_p": {"temperature": 1.0, "top_p": 0.9},
        }  # fmt: skip
        result["sampled"] = {name: decode(driver, 64, 128, 64, **choice) for name, choice in choices.items()}
        print("sampled", json.dumps(result["sampled"]), flush=True)
    if "shift" in given.phases:
        engine.set_level(0)
        walks = [layers, 0, layers, 0, len(parts.capacities) - 1, 0]
        result["shift"] = []
        for target in walks:
            result["shift"].append(shift(driver, target))
            print("shift", json.dumps(result["shift"][-1]), flush=True)
    if "paced" in given.phases:
        result["paced"] = [paced(driver, 2, 7), paced(driver, layers + 2, 7)]
        for row in result["paced"]:
            print("paced", json.dumps(row), flush=True)
    if "trace" in given.phases:
        engine.set_level(0)
        result["trace"] = trace(driver, 4)
        print("idle share", result["trace"]["idle_share"], flush=True)
    engine.check_integrity()
    if given.out:
        events = result.pop("trace", None)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if events:
            given.out.with_suffix(".trace.json").write_text(json.dumps(events), encoding="utf-8")
    engine.close()


if __name__ == "__main__":
    main()
