"""Phases in which layers change while a batch decodes: one alone, many at once, paced, and what they take of memory."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from bench_setup import Bench
from engine_driver import Company, HostTime, quantile, spread, timed_host
from kernel_trace import kernels_of, side_ms
from memory_watch import Watch

from morph_runtime.engine.process import SHIFT_POLL_S

Row = dict[str, Any]


def one(company: Company, target: int, host: HostTime) -> Row:
    """Change one layer: until its pages have moved too."""
    company.ensure(40)
    engine = company.driver.engine
    alone = company.alone(5)
    quiet = statistics.median(host.polls[-5:])
    host.clear()
    began, engine.parts.shifter.target = time.monotonic(), target
    flipped, gaps = 0, []
    while not flipped or engine.parts.shifter.busy:
        gaps.append(company.step())
        if not flipped and engine.level == target:
            flipped = len(gaps)
        if len(gaps) > 1000:
            raise RuntimeError(f"level {target} was not reached in 1,000 steps")
    return {
        "to": target, "boundaries": flipped, "steps": len(gaps), "settled_ms": (time.monotonic() - began) * 1e3,
        **host.row(quiet), "itl_max_ms": max(gaps), "alone_p50_ms": statistics.median(alone),
        "added_ms": sum(gaps) - statistics.median(alone) * len(gaps),
    }  # fmt: skip


def layer(bench: Bench) -> dict[str, Any]:
    """Layers down alone, one after the other, and up again; the first is the first of this engine's life if this is
    the first phase."""
    scale = bench.scale
    first_ever = bench.engine.parts.shifter.counters.down == 0
    company = Company(bench.driver, scale.batch, scale.prompt, 600)
    company.ensure(40)
    with timed_host(bench.engine) as host:
        down = [one(company, level + 1, host) for level in range(scale.one_by_one)]
        up = [one(company, level, host) for level in reversed(range(scale.one_by_one))]
    bench.driver.clear()
    return {
        "first_of_all": first_ever, "down": down, "up": up,
        **{f"first_to_last_{name}": down[0][f"{name}_ms"] / down[-1][f"{name}_ms"] for name in ("host", "settled")},
    }  # fmt: skip


def layer_gpu(bench: Bench) -> Row:
    """GPU time, on the stream beside that of the steps, of one layer that changes; with a profile, so not with the
    host's time."""
    scale, shifter, row = bench.scale, bench.engine.parts.shifter, {}
    bench.engine.set_level(0)
    company = Company(bench.driver, scale.batch, scale.prompt, 200)
    for way in ("down", "up"):
        company.ensure(40)
        shifter.target = 1 if way == "down" else 0
        row[f"{way}_gpu_ms"] = side_ms(kernels_of(bench.driver, 10))
    bench.driver.clear()
    bench.engine.set_level(0)
    return row


def walk(company: Company, target: int) -> Row:
    """Go to a level while a batch decodes."""
    company.ensure(120)
    engine = company.driver.engine
    start, began = engine.level, time.monotonic()
    engine.parts.shifter.target = target
    gaps, flipped, levels = [], 0.0, []
    while not flipped or engine.parts.shifter.busy:
        gaps.append(company.step())
        levels.append(engine.level)
        if not flipped and engine.level == target:
            flipped = time.monotonic() - began
        if company.left < 2:
            company.ensure(120)  # a batch that ends in the middle would leave nobody to feel it
        if len(gaps) > 20_000:
            raise RuntimeError(f"level {target} was not reached in 20,000 steps")
    settled = time.monotonic() - began
    company.ensure(16)
    after = company.alone(14)[2:]
    return {
        "from": start, "to": target, "flipped_ms": flipped * 1e3, "settled_ms": settled * 1e3, "steps": len(gaps),
        "itl_max_ms": max(gaps), "itl_p50_ms": statistics.median(gaps), "after_p50_ms": statistics.median(after),
        "levels": levels[:40],
    }  # fmt: skip


def shift(bench: Bench) -> list[Row]:
    """Walks of all layers, twice to the first rung and once to the last."""
    bench.engine.set_level(0)
    company = Company(bench.driver, bench.scale.batch, bench.scale.prompt, 400)
    deepest = len(bench.engine.parts.capacities) - 1
    rows = []
    with timed_host(bench.engine) as host:
        for target in (bench.layers, 0, bench.layers, 0, deepest, 0):
            host.clear()
            rows.append({**walk(company, target), **host.row()})
    bench.driver.clear()
    return rows


def memory(bench: Bench) -> dict[str, Any]:
    """What this process has taken while layers change, against the budget; and at rest at each rung."""
    engine, mib = bench.engine, 2**20
    engine.set_level(0)
    company = Company(bench.driver, bench.scale.batch, bench.scale.prompt, 400)
    deepest = len(engine.parts.capacities) - 1
    rows: list[Row] = []
    for target in (bench.layers, deepest, bench.layers, 0):
        with Watch(bench.memory) as watch:
            row = walk(company, target)
        rows.append({
            "from": row["from"], "to": target, "ms": row["settled_ms"], "max_mib": watch.most / mib,
            "samples": watch.count, "question_us": watch.seconds / max(1, watch.count) * 1e6,
        })  # fmt: skip
    bench.driver.clear()
    rest = {}
    for rung, level in bench.levels.items():
        engine.set_level(level)
        rest[rung] = bench.memory.used_bytes() / mib
    budget, most = engine.parts.ledger.budget_bytes / mib, max(row["max_mib"] for row in rows)
    return {
        "budget_mib": budget, "max_mib": most, "within": most <= budget, "walks": rows, "rest_mib": rest,
        "kv_token_bytes": bench.roofline.kv_token_bytes,
    }  # fmt: skip


def paced(bench: Bench) -> list[Row]:
    """Shift a layer every few steps around a level, down and up in turns, and compare with that level left alone."""
    swing = bench.scale.swing
    first = max(1, swing // 5)
    return [_paced(bench, first, swing), _paced(bench, bench.layers + first, swing)]


def _paced(bench: Bench, first: int, swing: int, every_steps: int = 7) -> Row:
    engine, shifter = bench.engine, bench.engine.parts.shifter
    engine.set_level(first)
    company = Company(bench.driver, bench.scale.batch, bench.scale.prompt, bench.scale.paced_steps + 40)

    def gaps(shifting: bool) -> tuple[list[float], float, int]:
        seen: list[float] = []
        count, began = 0, time.monotonic()
        while len(seen) < bench.scale.paced_steps:
            if company.left < 2 or not seen:
                company.ensure(min(bench.scale.paced_steps, company.output - 60))
                began = time.monotonic() if not seen else began
            if shifting and len(seen) % every_steps == 0:
                shifter.target = engine.level + (1 if count % (2 * swing) < swing else -1)
                count += 1
            seen.append(company.step())
        return seen, time.monotonic() - began, count

    engine.set_level(first + swing // 2)
    alone = spread(gaps(False)[0])
    bench.driver.clear()
    engine.set_level(first)
    company = Company(bench.driver, bench.scale.batch, bench.scale.prompt, bench.scale.paced_steps + 40)
    seen, seconds, count = gaps(True)
    moved = spread(seen)
    bench.driver.clear()
    return {
        "around": first + swing // 2, "layers_per_s": count / seconds, **moved,
        **{f"alone_{name}": value for name, value in alone.items()}, "p999_ms": quantile(seen, 0.999),
    }  # fmt: skip


def upcopy(bench: Bench) -> dict[str, float]:
    """All layers up with nobody there, against the rate at which pinned memory is copied in this run.

    The loop waits as the engine's process does: one that asks without a pause keeps the interpreter's lock from the
    thread that maps, which asks for it after each call of the driver.
    """
    engine, device = bench.engine, torch.device(bench.engine.parts.config.device)
    nbytes = engine.parts.ledger.slot_bytes["full"] * bench.layers
    result: dict[str, float] = {"h2d_gb_s": pinned_rate(device, bench.scale.copy_mib << 20)}
    for name in ("walk_1", "walk_2"):
        engine.set_level(bench.layers)
        began, engine.parts.shifter.target = time.monotonic(), 0
        while engine.level or engine.parts.shifter.busy:
            bench.woken.clear()
            engine.step(decide=False)
            bench.woken.wait(SHIFT_POLL_S)
        result[f"{name}_gb_s"] = nbytes / (time.monotonic() - began) / 1e9
    result["h2d_after_gb_s"] = pinned_rate(device, bench.scale.copy_mib << 20)
    best = max(result["h2d_gb_s"], result["h2d_after_gb_s"])
    return {**result, "bytes": float(nbytes), "of_h2d": max(result["walk_1_gb_s"], result["walk_2_gb_s"]) / best}


def pinned_rate(device: torch.device, nbytes: int) -> float:
    """GB/s of copies from pinned memory; the median of some."""
    is_gpu = device.type == "cuda"
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=is_gpu)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(9):
        if is_gpu:
            torch.cuda.synchronize()
        began = time.monotonic()
        target.copy_(host, non_blocking=True)
        if is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    del target
    if is_gpu:
        torch.cuda.empty_cache()
    return nbytes / statistics.median(seconds[1:]) / 1e9
