"""How well a cost model is measured on a simulated device that pads its steps, under noise and outliers.

    python -m bench.costs.padded [--seeds 20] [--outliers 0.01] [--seconds 5]

The device is that of `tests/unit/engine/test_costs_padded.py`; a seed is one start of an engine.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from morph_runtime.config import EngineConfig
from morph_runtime.costs.held_out import check_held_out
from morph_runtime.costs.measure import measure
from morph_runtime.engine.build import build_engine
from morph_runtime.morph.levels import LevelPlan
from tests.unit.engine.conftest import make_model
from tests.unit.engine.padding_device import Noise, PaddingDevice, own_time

LADDER = ("w8", "w4")
STEP_SIZES = (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)
MIXED_SIZES = (128, 256, 512, 768, 1280, 2048)
HELD_OUT_S = 20.0


def start(folder: Path, noise: Noise, seconds: float) -> tuple[float, list[float]]:
    """Measure once; seconds on the device's clock, and the errors of the held-out steps."""
    settings = {
        "model": {"path": str(folder), "dtype": "float32"},
        "memory": {"kv_tokens": 24576, "block_tokens": 16, "extent_kib": 16},
        "scheduler": {"max_num_seqs": 64, "max_num_batched_tokens": STEP_SIZES[-1]},
        "morph": {"mode": "off", "costs": "off", "ladder": list(LADDER)},
        "kernels": {"threads": 1},
        "overlap": "on",
    }
    engine = build_engine(EngineConfig.from_mapping(settings))
    try:
        device = PaddingDevice(lambda: engine.parts.swapper.rungs, STEP_SIZES, MIXED_SIZES, noise)
        parts, plan = replace(engine.parts, runner=device), LevelPlan(range(engine.parts.spec.layers), LADDER)
        costs = measure(parts, plan, seconds, device.clock).costs
        took_s = device.now_s
        return took_s, [abs(row.error) for row in check_held_out(parts, plan, costs, HELD_OUT_S, device.clock)]
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--outliers", type=float, default=0.01, help="share of slow steps, and of ends seen late")
    parser.add_argument("--seconds", type=float, default=5.0, help="for measuring")
    options = parser.parse_args()
    print("| seed | measuring s | held-out steps | median error | largest |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, own_time():
        make_model(Path(folder), kv_heads=2, positions=4096)
        for seed in range(options.seeds):
            noise = Noise(np.random.default_rng(seed), 0.01, options.outliers, options.outliers)
            took_s, errors = start(Path(folder), noise, options.seconds)
            print(f"| {seed} | {took_s:.2f} | {len(errors)} | {np.median(errors):.1%} | {max(errors):.1%} |")


if __name__ == "__main__":
    main()
