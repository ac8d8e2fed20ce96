"""What the cost model adds to an engine's start, and its correction to a step.

    python bench/costs/start.py [--model models/morph-demo]

Processor time and the time that passes, with costs off, measured, and from the cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np

from morph_runtime.config import EngineConfig
from morph_runtime.costs.correction import StepCorrection
from morph_runtime.engine.build import build_engine
from morph_runtime.models.batch import HostBatch
from morph_runtime.morph.costs import StepCosts

REPEATS, STEPS = 30, 200


def start(model: str, name: str, **morph: object) -> StepCosts | None:
    wall, cpu = time.perf_counter(), time.process_time()
    engine = build_engine(EngineConfig.from_mapping({"model": {"path": model}, "morph": morph}))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{name:28} {cpu:6.2f} s of processor time, {wall:6.2f} s passed")
    costs = engine.parts.costs
    engine.close()
    return costs


def batch_of(lengths: list[int], contexts: list[int]) -> HostBatch:
    tokens, ends = np.zeros(sum(lengths), dtype=np.int64), np.array(contexts, dtype=np.int32)
    sizes, nothing = np.array(lengths, dtype=np.int32), np.zeros(0, dtype=np.int64)
    return HostBatch(tokens, tokens, tokens, sizes, ends, nothing.astype(np.int32), ends, nothing)


def correct(costs: StepCosts, name: str, batch: HostBatch) -> None:
    correction, best = StepCorrection(costs), float("inf")
    for _ in range(REPEATS):
        began = time.thread_time()
        for _ in range(STEPS):
            correction.observe(0, correction.predict(0, batch), 0.01)
        best = min(best, (time.thread_time() - began) / STEPS)
    print(f"correction, {name:17} {best * 1e6:5.1f} us a step")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/morph-demo")
    model = parser.parse_args().model
    start(model, "imports and caches", costs="off")
    start(model, "off", costs="off")
    with tempfile.TemporaryDirectory() as folder:
        start(model, "measured, w8,w4", cost_cache=folder, ladder=["w8", "w4"])
        start(model, "measured, w4", cost_cache=folder)
        costs = start(model, "from the cache, w4", cost_cache=folder)
    assert costs is not None
    correct(costs, "64 decodes", batch_of([1] * 64, [300] * 64))
    correct(costs, "48 and a chunk", batch_of([1] * 48 + [400], [300] * 48 + [600]))


if __name__ == "__main__":
    main()
