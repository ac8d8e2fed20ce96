"""A decode step of a layer without its matrix products, as one captured chain of kernels.

    python bench/gpu_kernels/layer.py

Shape: Llama-3-8B. Needs an NVIDIA GPU. Writes $OUT/layer.json where OUT is set.
"""

from __future__ import annotations

import torch
from attention import DTYPE, LLAMA3_8B, cache, shuffled_tables
from timing import graph_us, save

from morph_runtime.kernels.cuda import fused
from morph_runtime.kernels.cuda.attention_decode import allocate_workspace, decode, decode_splits
from morph_runtime.kernels.cuda.rope import rope_store
from morph_runtime.kernels.rope import RopeSpec, RopeTable

LAYERS, BLOCK_TOKENS, FFN = 8, 16, 14336


def time_layer(rows: int, context: int, fp8: bool) -> dict[str, object]:
    heads, kv_heads, dim = LLAMA3_8B
    width, blocks_each = heads * dim, context // BLOCK_TOKENS + 1
    kv = cache(LAYERS, rows * blocks_each, BLOCK_TOKENS, LLAMA3_8B)
    tables = shuffled_tables(rows, blocks_each)
    contexts = torch.full((rows,), context, dtype=torch.int32, device="cuda")
    positions = contexts.long() - 1
    blocks = tables.gather(1, (positions // BLOCK_TOKENS)[:, None])[:, 0].long()
    slots = blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS
    table = RopeTable(RopeSpec(), dim, 8192, DTYPE)._table.cuda()
    hidden, delta, out = (torch.randn(rows, width, device="cuda").to(DTYPE) for _ in range(3))
    weight = torch.randn(width, device="cuda").to(DTYPE)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device="cuda").to(DTYPE)
    gate_up = torch.randn(rows, 2 * FFN, device="cuda").to(DTYPE)
    q = qkv[:, :width].unflatten(1, (heads, dim))
    splits = decode_splits(rows, kv_heads, 8192, torch.cuda.get_device_properties(0).multi_processor_count)
    workspace = allocate_workspace(rows, heads, dim, splits, q.device)

    def layer(number: int) -> None:
        k, v = kv[number]
        fused.add_norm(hidden, delta, weight, 1e-5, fp8=fp8)
        rope_store(qkv, positions, slots, table, k, v, heads, kv_heads, dim)
        decode(q, k, v, tables, contexts, out, workspace, splits=splits, scale=dim**-0.5)
        if fp8:
            fused.quantize_rows(out)
        fused.add_norm(hidden, delta, weight, 1e-5, fp8=fp8)
        fused.swiglu(gate_up, fp8=fp8)

    us = graph_us([lambda number=number: layer(number) for number in list(range(LAYERS)) * 4])
    return {"rows": rows, "context": context, "fp8": fp8, "us": round(us, 2)}


def main() -> None:
    results = []
    for rows, context in [(1, 256), (8, 256), (64, 512), (256, 512)]:
        for fp8 in (False, True):
            results.append(time_layer(rows, context, fp8))
            print(results[-1], flush=True)
    save("layer", results)


if __name__ == "__main__":
    main()
