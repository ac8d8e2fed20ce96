"""Which tiles are best: times every candidate for the linears of a model; kernels/cuda/tiles.py holds the winners.

python -m bench.gpu_kernels.sweep [--kinds int4,fp8,fp8x8] [--rows 1,16,...] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bench.gpu_kernels.timing import SHAPES, copies, graph_us
from morph_runtime.kernels.activation import Fp8Rows
from morph_runtime.kernels.cuda.int4 import TritonInt4Linear
from morph_runtime.kernels.cuda.rows import Fp8Linear
from morph_runtime.kernels.cuda.tiles import Tile
from morph_runtime.kernels.linear import LinearShape

WARPS = {  # (bn, warps) by rows of x per tile
    8: [(32, 2), (64, 2), (64, 4), (128, 4), (128, 8)],
    16: [(32, 2), (64, 2), (64, 4), (128, 4), (128, 8)],
    32: [(64, 2), (64, 4), (128, 4), (128, 8), (256, 8)],
    64: [(64, 4), (128, 4), (128, 8), (256, 8)],
    128: [(64, 4), (128, 4), (128, 8), (256, 8)],
    256: [(64, 4), (128, 4), (128, 8)],
}
HEIGHTS = {
    1: (8, 16),
    8: (8, 16),
    16: (8, 16),
    32: (16, 32),
    64: (32, 64),
    128: (64, 128),
    256: (128, 256),
    512: (128, 256),
    1024: (128, 256),
}
"""Rows of x -> candidates for the rows per tile."""


def modes(kind: str, bm: int, bn: int, warps: int) -> list[str]:
    """W4's ways through a group that are worth a try."""
    if kind != "int4":
        return ["whole"]
    if bm < 16 or warps < 4:
        return ["warp"]
    return ["whole", "halves"]


def forms(kind: str, m: int) -> Iterator[Tile]:
    for bm in HEIGHTS[m]:
        for bn, warps in WARPS[bm]:
            x_bytes, w_bytes = (1 if kind == "fp8x8" else 2), (0.5 if kind == "int4" else 1)
            for stages in (2, 3, 4) if kind == "int4" and bm >= 64 else (3, 4, 6):
                for mode in modes(kind, bm, bn, warps):
                    if stages * 128 * (bm * x_bytes + bn * w_bytes) <= 220_000 and (kind == "int4" or warps >= 4):
                        yield Tile(bm, bn, 1, warps, stages, 128, mode, kind == "fp8" and 16 <= bm <= 32)


def candidates(kind: str, m: int, n: int, k: int) -> Iterator[Tile]:
    for form in forms(kind, m):
        tiles = -(-m // form.bm) * -(-n // form.bn)
        wanted = {max(1, round(p / tiles)) for p in (132, 264, 396, 528, 1056)} if m <= 128 else {1, 2}
        for splits in sorted(s for s in wanted if s * 256 <= k and s <= 32):
            if splits == 1 or tiles <= n // 16:
                yield replace(form, splits=splits)


def product(kind: str, m: int, n: int, k: int, many: bool) -> tuple[Callable[[Tile], list[Callable[[], object]]], int]:
    """A function from a tile to calls over rotating weights, and the weights' bytes."""
    kernel = TritonInt4Linear(torch.bfloat16) if kind == "int4" else Fp8Linear(torch.bfloat16)
    shape = LinearShape("x", n, k)
    nbytes = sum(field.nbytes for field in kernel.fields(shape))
    first = {f.name: torch.zeros(f.shape, dtype=f.dtype, device="cuda") for f in kernel.fields(shape)}
    kernel.pack(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.05, first)
    more = range(copies(nbytes) - 1 if many else 0)
    weights = [first, *({name: tensor.clone() for name, tensor in first.items()} for _ in more)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    x8 = Fp8Rows(x.to(torch.float8_e4m3fn), torch.ones(m, 1, device="cuda"))
    scratch = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")

    def calls(tile: Tile) -> list[Callable[[], object]]:
        if kind == "fp8x8":
            return [lambda w=w: kernel.run_fp8_tile(x8, w, scratch, tile) for w in weights]  # type: ignore[misc]
        return [lambda w=w: kernel.run_tile(x, w, scratch, tile) for w in weights]  # type: ignore[misc]

    return calls, nbytes


def compile_one(job: tuple[str, int, Tile]) -> str:
    """Fill the compiler's cache from a process of its own."""
    kind, m, form = job
    try:
        calls, _ = product(kind, min(m, 16), 2048, 2048, False)
        for splits in (1, 2):
            calls(replace(form, splits=splits))[0]()
    except Exception as error:  # noqa: BLE001 - a form that does not compile is left out of the sweep
        return f"{kind} {form}: {type(error).__name__} {str(error).splitlines()[0]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", default="int4,fp8,fp8x8")
    parser.add_argument("--rows", default="1,16,32,64,128,256")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--out", default="")
    parser.add_argument("--processes", type=int, default=14)
    options = parser.parse_args()
    kinds, rows = options.kinds.split(","), [int(m) for m in options.rows.split(",")]
    wanted = [(kind, m) for kind in kinds for m in rows]
    jobs = list({(kind, form.bm, form): None for kind, m in wanted for form in forms(kind, m)})
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        failures = [text for text in pool.imap_unordered(compile_one, jobs) if text]
    print(
        f"compiled {len(jobs)} forms in {time.monotonic() - began:.0f} s; {len(failures)} fail", *failures[:4], sep="\n"
    )
    found = []
    for kind, m in wanted:
        for name, (n, k) in SHAPES[options.model].items():
            make, nbytes = product(kind, m, n, k, True)
            times = []
            for tile in candidates(kind, m, n, k):
                try:
                    times.append((graph_us(make(tile)), tile))
                except Exception as error:  # noqa: BLE001 - as above
                    found.append({"kind": kind, "m": m, "linear": name, "tile": str(tile), "error": str(error)[:200]})
            times.sort(key=lambda pair: pair[0])
            for us, tile in times:
                found.append({"kind": kind, "m": m, "linear": name, "us": us, **tile.__dict__})
            best = " | ".join(
                f"{us:.1f} bm{t.bm} bn{t.bn} s{t.splits} w{t.warps} st{t.stages}{' wide' * t.wide}"
                for us, t in times[:3]
            )
            print(f"{kind} m={m} {name}: {nbytes / times[0][0] / 1e3:.0f} GB/s: {best}", flush=True)
        print(f"  at {time.monotonic() - began:.0f} s", flush=True)
    if options.out:
        Path(options.out, "sweep.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
