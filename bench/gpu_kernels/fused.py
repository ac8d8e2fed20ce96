"""The row-wise kernels of a decoder layer on a GPU, against the memory's speed.

    python bench/gpu_kernels/fused.py

Needs an NVIDIA GPU. Writes $OUT/fused.json where OUT is set.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import COPY_GB_S, graph_us, save
from torch import Tensor

from morph_runtime.kernels.cuda import fused
from morph_runtime.kernels.cuda.rope import rope_store
from morph_runtime.kernels.rope import RopeSpec, RopeTable

HIDDEN, FFN, HEADS, KV_HEADS, DIM = 4096, 14336, 32, 8, 128
BLOCK_TOKENS = 16
DTYPE = torch.bfloat16


def timed(name: str, rows: int, nbytes: int, make: Callable[[], Callable[[], object]]) -> dict[str, object]:
    """`make` gives a call with memory of its own; enough of them pass through the L2 cache."""
    calls = [make() for _ in range(max(min(int(400e6 / nbytes), 64), 4))]
    us = graph_us(calls)
    gb_s = nbytes / us / 1e3
    share = round(gb_s / COPY_GB_S, 3)
    row = {"kernel": name, "rows": rows, "us": round(us, 2), "gb_s": round(gb_s), "of_copy": share}
    print(row, flush=True)
    return row


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(DTYPE)


def main() -> None:
    weight = random(HIDDEN)
    table = RopeTable(RopeSpec(), DIM, 8192, DTYPE)._table.cuda()
    results = []
    for rows in (1, 8, 64, 256, 2048):

        def norm(fp8: bool, rows: int = rows) -> Callable[[], object]:
            hidden, delta = random(rows, HIDDEN), random(rows, HIDDEN)
            return lambda: fused.add_norm(hidden, delta, weight, 1e-5, fp8=fp8)

        def activation(fp8: bool, rows: int = rows) -> Callable[[], object]:
            gate_up = random(rows, 2 * FFN)
            return lambda: fused.swiglu(gate_up, fp8=fp8)

        def quantize(rows: int = rows) -> Callable[[], object]:
            x = random(rows, HIDDEN)
            return lambda: fused.quantize_rows(x)

        def rope(rows: int = rows) -> Callable[[], object]:
            qkv = random(rows, (HEADS + 2 * KV_HEADS) * DIM)
            blocks = -(-rows // BLOCK_TOKENS) + 1
            span = torch.zeros(blocks, 2, BLOCK_TOKENS, KV_HEADS, DIM, device="cuda", dtype=DTYPE)
            positions = torch.arange(rows, device="cuda")
            return lambda: rope_store(qkv, positions, positions, table, span[:, 0], span[:, 1], HEADS, KV_HEADS, DIM)

        results += [
            timed("add_norm", rows, rows * HIDDEN * 8, lambda norm=norm: norm(False)),
            timed("add_norm fp8", rows, rows * HIDDEN * 7, lambda norm=norm: norm(True)),
            timed("swiglu", rows, rows * FFN * 6, lambda activation=activation: activation(False)),
            timed("swiglu fp8", rows, rows * FFN * 5, lambda activation=activation: activation(True)),
            timed("quantize_rows", rows, rows * HIDDEN * 3, quantize),
            timed("rope_store", rows, rows * (HEADS + 2 * KV_HEADS) * DIM * 4, rope),
        ]
    save("fused", results)


if __name__ == "__main__":
    main()
