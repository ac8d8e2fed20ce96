"""Paged attention on a GPU: decode against the memory's speed, prefill against PyTorch's flash attention.

    python bench/gpu_kernels/attention.py [--block-tokens 16 32 64]

Needs an NVIDIA GPU. Writes $OUT/attention.json where OUT is set.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import COPY_GB_S, MATRIX_TFLOP_S, graph_us, save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from morph_runtime.kernels.cuda.attention_decode import allocate_workspace, decode, decode_splits
from morph_runtime.kernels.cuda.attention_prefill import prefill, prefill_tiles, tile_tokens

DTYPE = torch.bfloat16


class Heads(NamedTuple):
    """A model's attention."""

    heads: int
    kv_heads: int
    dim: int


LLAMA3_8B = Heads(32, 8, 128)
LLAMA2_7B = Heads(32, 32, 128)


def cache(layers: int, blocks: int, block_tokens: int, shape: Heads) -> Tensor:
    """[layers, 2, blocks, block_tokens, kv_heads, head_dim]"""
    size = (layers, 2, blocks, block_tokens, shape.kv_heads, shape.dim)
    return torch.empty(size, dtype=DTYPE, device="cuda").normal_()


def shuffled_tables(sequences: int, blocks_each: int) -> Tensor:
    """int32 [sequences, blocks_each], no block twice."""
    order = torch.randperm(sequences * blocks_each, device="cuda", dtype=torch.int64)
    return order.view(sequences, blocks_each).int()


def time_decode(
    shape: Heads,
    sequences: int,
    context: int,
    block_tokens: int,
    max_context: int = 8192,
    splits: int = 0,
    varied: bool = False,
) -> dict[str, object]:
    """All contexts of one length, or varied: evenly from 1/32 of it up to 2 times."""
    if varied:
        lengths = torch.linspace(context / 32, 63 / 32 * context, sequences).round().int().tolist()
    else:
        lengths = [context] * sequences
    longest = max(lengths)
    blocks_each = -(-longest // block_tokens)
    layer_bytes = sum(lengths) * 2 * shape.kv_heads * shape.dim * 2
    layers = max(min(int(4e9 / layer_bytes), 64), 2)
    kv = cache(layers, sequences * blocks_each, block_tokens, shape)
    tables = shuffled_tables(sequences, blocks_each)
    contexts = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    qkv = torch.randn(sequences, (shape.heads + 2 * shape.kv_heads) * shape.dim, device="cuda", dtype=DTYPE)
    q = qkv[:, : shape.heads * shape.dim].unflatten(1, (shape.heads, shape.dim))
    out = torch.empty(sequences, shape.heads * shape.dim, device="cuda", dtype=DTYPE)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = splits or decode_splits(sequences, shape.kv_heads, max_context, processors)
    workspace = allocate_workspace(sequences, shape.heads, shape.dim, splits, q.device)
    calls = [
        lambda layer=layer: decode(
            q, kv[layer, 0], kv[layer, 1], tables, contexts, out, workspace, splits=splits, scale=shape.dim**-0.5
        )
        for layer in range(layers)
    ]
    us = graph_us(calls)
    gb_s = layer_bytes / us / 1e3
    return {
        "kernel": "decode",
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "sequences": sequences,
        "context": context,
        "varied": varied,
        "block_tokens": block_tokens,
        "splits": splits,
        "us": round(us, 2),
        "gb_s": round(gb_s),
        "of_copy": round(gb_s / COPY_GB_S, 3),
    }


def time_prefill(shape: Heads, lengths: list[int], context: int, block_tokens: int) -> dict[str, object]:
    """Each sequence's `length` last tokens of `context` (0: all of them)."""
    contexts = [context or length for length in lengths]
    blocks_each = -(-max(contexts) // block_tokens)
    layers = 8
    kv = cache(layers, len(lengths) * blocks_each, block_tokens, shape)
    tables = shuffled_tables(len(lengths), blocks_each)
    rows = sum(lengths)
    qkv = torch.randn(rows, (shape.heads + 2 * shape.kv_heads) * shape.dim, device="cuda", dtype=DTYPE)
    q = qkv[:, : shape.heads * shape.dim].unflatten(1, (shape.heads, shape.dim))
    out = torch.empty(rows, shape.heads * shape.dim, device="cuda", dtype=DTYPE)
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device="cuda")
    tiles = prefill_tiles(list(enumerate(lengths)), tile_tokens(*shape, 2))
    on_device = torch.tensor(tiles, dtype=torch.int32, device="cuda")
    lengths_on_device = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    calls = [
        lambda layer=layer: prefill(
            q,
            kv[layer, 0],
            kv[layer, 1],
            tables,
            starts,
            lengths_on_device,
            on_device,
            out,
            scale=shape.dim**-0.5,
        )
        for layer in range(layers)
    ]
    us = graph_us(calls)
    pairs = sum(
        length * (whole - length) + length * (length + 1) / 2 for length, whole in zip(lengths, contexts, strict=True)
    )
    tflop_s = 4 * shape.heads * shape.dim * pairs / us / 1e6
    row: dict[str, object] = {
        "kernel": "prefill",
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "lengths": lengths,
        "context": context,
        "block_tokens": block_tokens,
        "us": round(us, 1),
        "tflop_s": round(tflop_s),
        "of_matrix": round(tflop_s / MATRIX_TFLOP_S, 3),
    }
    if not context and len(set(lengths)) == 1:
        row["flash_us"] = round(flash_us(shape, len(lengths), lengths[0]), 1)
        row["us_over_flash"] = round(us / float(row["flash_us"]), 2)
    return row


def flash_us(shape: Heads, sequences: int, length: int) -> float:
    """PyTorch's flash attention on contiguous tensors."""
    q = torch.randn(sequences, shape.heads, length, shape.dim, device="cuda", dtype=DTYPE)
    k, v = (torch.randn(sequences, shape.kv_heads, length, shape.dim, device="cuda", dtype=DTYPE) for _ in range(2))

    def call() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return graph_us([call] * 8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--block-tokens", type=int, nargs="+", default=[16, 32, 64])
    block_sizes = parser.parse_args().block_tokens
    rows = []
    for shape in (LLAMA3_8B, LLAMA2_7B):
        for block_tokens in block_sizes if shape is LLAMA3_8B else block_sizes[:1]:
            for sequences, context in [(1, 256), (8, 256), (8, 2048), (32, 1024), (64, 2048), (64, 4096), (256, 1024)]:
                for varied in (False, True) if sequences > 1 else (False,):
                    rows.append(time_decode(shape, sequences, context, block_tokens, varied=varied))
                    print(rows[-1], flush=True)
            for lengths, context in [([2048], 0), ([2048] * 4, 0), ([8192], 0), ([2048], 8192), ([128] * 16, 0)]:
                rows.append(time_prefill(shape, lengths, context, block_tokens))
                print(rows[-1], flush=True)
    save("attention", rows)


if __name__ == "__main__":
    main()
