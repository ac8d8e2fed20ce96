"""Which layout of the KV cache lets decode attention read fastest: many GiB live, shuffled block tables.

    python bench/gpu_kernels/kv_layout.py [--gib 32]

A range holds the planes (K, V) of some layers, `[blocks, planes, block_tokens, kv_heads, head_dim]`: of one layer
(layer-major), of eight, or of all 32 (block-major). `head_major` swaps tokens and heads inside a plane. Shape:
Llama-3-8B. Needs an NVIDIA GPU with that memory free.
Writes $OUT/kv_layout.json where OUT is set.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from attention import DTYPE, LLAMA3_8B, shuffled_tables
from timing import COPY_GB_S, graph_us, save

from morph_runtime.kernels.cuda.attention_decode import allocate_workspace, decode, decode_splits

LAYERS = 32


def time_layout(
    gib: int, layers_in_range: int, block_tokens: int, sequences: int, head_major: bool
) -> dict[str, object]:
    shape = LLAMA3_8B
    token_bytes = LAYERS * 2 * shape.kv_heads * shape.dim * 2
    context = gib * 2**30 // token_bytes // sequences // 64 * 64
    blocks = sequences * context // block_tokens
    size = (LAYERS // layers_in_range, blocks, 2 * layers_in_range, block_tokens, shape.kv_heads, shape.dim)
    ranges = torch.empty(size, dtype=DTYPE, device="cuda").normal_()
    tables = shuffled_tables(sequences, context // block_tokens)
    contexts = torch.full((sequences,), context, dtype=torch.int32, device="cuda")
    q = torch.randn(sequences, shape.heads, shape.dim, device="cuda", dtype=DTYPE)
    out = torch.empty(sequences, shape.heads * shape.dim, device="cuda", dtype=DTYPE)
    splits = decode_splits(sequences, shape.kv_heads, 8192, 132)
    workspace = allocate_workspace(sequences, shape.heads, shape.dim, splits, q.device)

    def call(layer: int) -> None:
        planes, first = ranges[layer // layers_in_range], 2 * (layer % layers_in_range)
        if head_major:
            planes = planes.view(blocks, 2 * layers_in_range, shape.kv_heads, block_tokens, shape.dim).transpose(2, 3)
        k, v = planes[:, first], planes[:, first + 1]
        decode(q, k, v, tables, contexts, out, workspace, splits=splits, scale=shape.dim**-0.5)

    us = graph_us([lambda layer=layer: call(layer) for layer in range(LAYERS)])
    gb_s = sequences * context * token_bytes / LAYERS / us / 1e3
    return {
        "planes": 2 * layers_in_range,
        "block_tokens": block_tokens,
        "head_major": head_major,
        "sequences": sequences,
        "context": context,
        "us": round(us, 1),
        "gb_s": round(gb_s),
        "of_copy": round(gb_s / COPY_GB_S, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=int, default=32, help="live KV of all layers")
    gib = parser.parse_args().gib
    rows = []
    for sequences, layers, block_tokens, head_major in itertools.product(
        (64, 256), (1, 8, LAYERS), (16, 32, 64), (False, True)
    ):
        rows.append(time_layout(gib, layers, block_tokens, sequences, head_major))
        print(rows[-1], flush=True)
    save("kv_layout", rows)


if __name__ == "__main__":
    main()
