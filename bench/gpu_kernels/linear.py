"""The linears of a decoder layer at every rung: microseconds, GB/s and TFLOP/s, against cuBLAS; and packing.

python -m bench.gpu_kernels.linear [--model llama-3-8b] [--rows 1,8,...] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu_kernels.timing import SHAPES, copies, graph_us
from morph_runtime.kernels.activation import Fp8Rows
from morph_runtime.kernels.linear import LinearKernel, LinearShape
from morph_runtime.kernels.quantize import quantize_rows_fp8
from morph_runtime.kernels.registry import select
from morph_runtime.kernels.rung import Rung

CUDA = torch.device("cuda")
BF16 = torch.bfloat16


def packed(kernel: LinearKernel, shape: LinearShape) -> dict[str, Tensor]:
    """One linear of random weights."""
    out = {f.name: torch.empty(f.shape, dtype=f.dtype, device=CUDA) for f in kernel.fields(shape)}
    kernel.pack(torch.randn(shape.out_features, shape.in_features, device=CUDA, dtype=BF16) * 0.05, out)
    return out


def ways(kernel: LinearKernel, m: int) -> list[str]:
    """The ways to run it: as it chooses, and for W8 both kinds of activation."""
    return ["run"] if kernel.name != "fp8" else ["run", "fp8"] if m <= 256 else ["fp8"]


def time_linear(kernel: LinearKernel, shape: LinearShape, m: int, way: str) -> tuple[float, int, float]:
    """Microseconds, bytes read and written, and the relative error against the dequantized weights."""
    first = packed(kernel, shape)
    nbytes = sum(tensor.nbytes for tensor in first.values())
    weights = [first] + [{k: v.clone() for k, v in first.items()} for _ in range(copies(nbytes) - 1)]
    x = torch.randn(m, shape.in_features, device=CUDA, dtype=BF16)
    values, scales = quantize_rows_fp8(x)
    x8 = Fp8Rows(values, scales[:, None])
    scratch = torch.empty(max(kernel.scratch_bytes(shape), 64), dtype=torch.uint8, device=CUDA)

    def call(w: dict[str, Tensor]) -> Tensor:
        return kernel.run_fp8(x8, w, scratch) if way == "fp8" else kernel.run(x, w, scratch)

    rows = x.float() if way == "run" else values.float() * scales[:, None]
    wanted = rows[:64].double() @ kernel.dequantize(first).t().double()
    error = float((call(first)[:64].double() - wanted).norm() / wanted.norm())
    calls: list[Callable[[], object]] = [lambda w=w: call(w) for w in weights]  # type: ignore[misc]
    moved = nbytes + m * (shape.in_features * (1 if way == "fp8" else 2) + shape.out_features * 2)
    return graph_us(calls), moved, error


def time_pack(kernel: LinearKernel, shapes: list[LinearShape]) -> float:
    """Microseconds to pack a whole layer."""
    work = []
    for shape in shapes:
        weight = torch.randn(shape.out_features, shape.in_features, device=CUDA, dtype=BF16)
        work.append((weight, packed(kernel, shape)))

    def layer() -> None:
        for weight, out in work:
            kernel.pack(weight, out)

    return graph_us([layer], least_calls=2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--rows", default="1,3,8,16,32,37,64,96,128,200,256,512,1024,2048,8192")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    shapes = [LinearShape(name, n, k) for name, (n, k) in SHAPES[options.model].items()]
    found = []
    print("rung way M: sum us | per linear us (GB/s, TFLOP/s) | worst error")
    for m in (int(text) for text in options.rows.split(",")):
        rungs: tuple[Rung, ...] = ("full", "w8", "w4")
        for rung in rungs:
            kernel = select(rung, shapes[0], BF16, CUDA)
            for way in ways(kernel, m):
                cells, total, worst = [], 0.0, 0.0
                for shape in shapes:
                    us, moved, error = time_linear(kernel, shape, m, way)
                    flops = 2 * m * shape.in_features * shape.out_features
                    cells.append(f"{shape.name} {us:.1f} ({moved / us / 1e3:.0f}, {flops / us / 1e6:.0f})")
                    total, worst = total + us, max(worst, error)
                    row = {"rung": rung, "way": way, "m": m, "linear": shape.name, "us": us, "error": error}
                    found.append({**row, "gb_per_s": moved / us / 1e3, "tflop_per_s": flops / us / 1e6})
                chosen = " *" if kernel.wants_fp8(m) == (way == "fp8") and rung == "w8" else ""
                print(f"{rung} {way}{chosen} M={m}: {total:.0f} | {', '.join(cells)} | {worst:.1e}", flush=True)
    for rung in ("w8", "w4"):
        us = time_pack(select(rung, shapes[0], BF16, CUDA), shapes)
        print(f"pack a layer to {rung}: {us:.0f} us")
        found.append({"rung": rung, "way": "pack", "us": us})
    if options.out:
        Path(options.out, f"linear-{options.model}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
