"""Time the CPU linears per rung and token count, and find where the packed kernels stop paying.

Weights rotate over `--rotate-mib` of copies, so that they come from memory as in a model whose layers do
not fit the caches; `--rotate-mib 0` uses one copy (hot caches).

    python bench/kernels/linear_cpu.py --out bench/kernels/results/linear_cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morph_runtime.kernels.full_torch import TorchLinear
from morph_runtime.kernels.int4_cpu import AtenInt4Linear, NibbleLinear
from morph_runtime.kernels.int8_cpu import AtenInt8Linear, Int8Linear
from morph_runtime.kernels.linear import LinearKernel, LinearShape

SHAPES = {
    "demo": [
        LinearShape("qkv", 512, 256),
        LinearShape("o", 256, 256),
        LinearShape("gate_up", 1536, 256),
        LinearShape("down", 256, 768),
    ],
    "1b": [
        LinearShape("qkv", 3072, 2048),
        LinearShape("o", 2048, 2048),
        LinearShape("gate_up", 16384, 2048),
        LinearShape("down", 2048, 8192),
    ],
}
"""Linears of one layer: the demo model's, and Llama 3.2 1B's."""

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512)


def variants() -> dict[str, LinearKernel]:
    """Every kernel, the packed ones also pinned to one of their two ways."""
    dtype = torch.bfloat16
    found: dict[str, LinearKernel] = {"full": TorchLinear(dtype)}
    example = LinearShape("qkv", 512, 256)
    if AtenInt8Linear.can_implement(example, dtype, torch.device("cpu"))[0]:
        found["w8 direct"] = AtenInt8Linear(dtype, 10**9)
        found["w8 as served"] = AtenInt8Linear(dtype)
    found["w8 scratch"] = Int8Linear(dtype)
    if AtenInt4Linear.can_implement(example, dtype, torch.device("cpu"))[0]:
        found["w4 direct"] = AtenInt4Linear(dtype, 10**9)
        found["w4 scratch"] = AtenInt4Linear(dtype, 0)
        found["w4 as served"] = AtenInt4Linear(dtype)
    found["w4 nibble"] = NibbleLinear(dtype)
    return found


def best_us(calls: list[Callable[[], Tensor]], seconds: float) -> float:
    """Microseconds per call: the best round over all of `calls`, for at least `seconds` and three rounds."""
    for call in calls:
        call()
    best, rounds, end = float("inf"), 0, time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        for call in calls:
            call()
        best = min(best, (time.perf_counter() - begin) / len(calls))
        rounds += 1
    return best * 1e6


def copies(kernel: LinearKernel, shape: LinearShape, rotate_bytes: int) -> list[dict[str, Tensor]]:
    """The same packed linear, as often as fills `rotate_bytes`, at most 64 times."""
    weight = torch.randn(shape.out_features, shape.in_features, dtype=kernel.dtype) * 0.05
    first = {f.name: torch.empty(f.shape, dtype=f.dtype) for f in kernel.fields(shape)}
    kernel.pack(weight, first)
    # As many copies for each rung as full precision needs: a real layer list has as many at any rung.
    count = max(1, min(64, rotate_bytes // weight.nbytes))
    return [first, *({name: t.clone() for name, t in first.items()} for _ in range(count - 1))]


def measure(shape: LinearShape, rotate_bytes: int, seconds: float) -> dict[str, dict[int, float]]:
    """Microseconds by variant and token count."""
    results: dict[str, dict[int, float]] = {}
    for label, kernel in variants().items():
        weights = copies(kernel, shape, rotate_bytes)
        scratch = torch.empty(kernel.scratch_bytes(shape), dtype=torch.uint8)
        results[label] = {}
        for tokens in TOKENS:
            if tokens > 128 and label.endswith("direct"):
                continue
            x = torch.randn(tokens, shape.in_features, dtype=kernel.dtype)
            calls = [_call(kernel, x, w, scratch) for w in weights]
            results[label][tokens] = round(best_us(calls, seconds), 1)
    return results


def _call(kernel: LinearKernel, x: Tensor, w: Mapping[str, Tensor], scratch: Tensor) -> Callable[[], Tensor]:
    return lambda: kernel.run(x, w, scratch)


def table(title: str, results: Mapping[str, Mapping[int, float]]) -> str:
    """A Markdown table, one row per variant."""
    lines = [f"{title}, µs", "", "| tokens | " + " | ".join(map(str, TOKENS)) + " |"]
    lines.append("|---|" + "---|" * len(TOKENS))
    for label, row in results.items():
        lines.append(f"| {label} | " + " | ".join(f"{row[t]:.0f}" if t in row else "–" for t in TOKENS) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="demo")
    parser.add_argument("--rotate-mib", type=int, default=48, help="MiB of weight copies to rotate over; 0: one copy")
    parser.add_argument("--seconds", type=float, default=0.05, help="least time per measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for shape in SHAPES[options.shapes]:
            results[shape.name] = measure(shape, options.rotate_mib << 20, options.seconds)
            print(table(f"{shape.name} [{shape.out_features}, {shape.in_features}]", results[shape.name]), flush=True)
    layer = {
        label: {t: round(sum(results[n][label][t] for n in results), 1) for t in results["qkv"][label]}
        for label in results["qkv"]
    }
    print(table("whole layer", layer))
    if options.out:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "threads": options.threads,
            "rotate_mib": options.rotate_mib,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "layer": layer, "linears": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
