from __future__ import annotations

import pytest
import torch

from kernels.cuda.oracle import Paged, attention, paged

pytest.importorskip("triton")
from morph_runtime.kernels.cuda.attention_decode import allocate_workspace, decode, decode_splits
from morph_runtime.kernels.cuda.attention_prefill import prefill, prefill_tiles, tile_tokens

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = {
    "Llama-3-8B": (32, 8, 128),
    "Llama-2-7B": (32, 32, 128),
    "CodeLlama-34B": (64, 8, 128),
    "Qwen2.5-7B": (28, 4, 128),
    "head 64": (14, 2, 64),
    "head 80": (8, 8, 80),
    "head 96": (8, 2, 96),
    "head 256": (8, 4, 256),
    "head 16": (4, 2, 16),
}


def queries(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, heads, head_dim]: a part of wider rows, as it stands in a step's qkv."""
    generator = torch.Generator("cuda").manual_seed(1)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device="cuda", generator=generator).to(dtype)
    return qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))


def check_decode(cache: Paged, q: torch.Tensor, splits: int, window: int = 0) -> None:
    rows, heads, head_dim = q.shape
    out = torch.full((rows, heads * head_dim), torch.nan, dtype=q.dtype, device="cuda")
    workspace = allocate_workspace(rows, heads, head_dim, splits, q.device).fill_(torch.nan)
    scale = head_dim**-0.5
    decode(q, cache.k, cache.v, cache.tables, cache.contexts, out, workspace, splits=splits, scale=scale, window=window)
    expected = attention(q, cache, list(range(rows + 1)), scale, window)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])


def check_prefill(cache: Paged, lengths: list[int], q: torch.Tensor, window: int = 0) -> None:
    rows, heads, head_dim = q.shape
    kv_heads = cache.k.shape[2]
    starts = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    tokens = tile_tokens(heads, kv_heads, head_dim, q.element_size())
    tiles = torch.tensor(prefill_tiles(list(enumerate(lengths)), tokens), dtype=torch.int32, device="cuda")
    out = torch.full((rows, heads * head_dim), torch.nan, dtype=q.dtype, device="cuda")
    scale = head_dim**-0.5
    prefill(
        q,
        cache.k,
        cache.v,
        cache.tables,
        torch.tensor(starts, dtype=torch.int32, device="cuda"),
        cache.contexts,
        tiles,
        out,
        scale=scale,
        window=window,
    )
    expected = attention(q, cache, starts, scale, window)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_and_prefill_agree_with_dense_attention(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim = shape
    cache = paged([1, 0, 63, 64, 1000, 517], kv_heads, head_dim, 16, dtype, "cuda", planes=4, plane=2)
    for splits in (1, 8):
        check_decode(cache, queries(6, heads, kv_heads, head_dim, dtype), splits)
    cache = paged([1, 33, 300, 1000, 517], kv_heads, head_dim, 16, dtype, "cuda", planes=4, plane=2)
    check_prefill(cache, [1, 33, 300, 129, 1], queries(464, heads, kv_heads, head_dim, dtype))


@pytest.mark.parametrize("block_tokens", [8, 32, 64, 128])
@pytest.mark.parametrize("window", [0, 1, 100, 4096])
def test_blocks_and_windows(block_tokens: int, window: int) -> None:
    contexts = [64, 1, 700]
    cache = paged(contexts, 8, 128, block_tokens, torch.bfloat16, "cuda", window=window)
    check_decode(cache, queries(3, 32, 8, 128, torch.bfloat16), 4, window)
    lengths = [64, 1, 200]
    cache = paged(contexts, 8, 128, block_tokens, torch.bfloat16, "cuda", window=window + 200 if window else 0)
    check_prefill(cache, lengths, queries(265, 32, 8, 128, torch.bfloat16), window)


def test_a_cache_beyond_2_to_the_31_elements() -> None:
    """Blocks at both ends of a range whose offsets need 64 bits."""
    blocks = 2**31 // (2 * 16 * 8 * 128) + 64
    span = torch.empty(blocks, 2, 16, 8, 128, dtype=torch.bfloat16, device="cuda")
    small = paged([90, 40], 8, 128, 16, torch.bfloat16, "cuda", spare=0)
    places = torch.arange(len(small.k), device="cuda")
    places[len(places) // 2 :] += blocks - len(places)
    span[places, 0], span[places, 1] = small.k, small.v
    tables = torch.where(small.tables >= 0, places[small.tables.clamp(min=0).long()], -1).int()
    cache = Paged(span[:, 0], span[:, 1], tables, small.contexts)
    assert int(tables.max()) * span.stride(0) > 2**31
    check_decode(cache, queries(2, 32, 8, 128, torch.bfloat16), 2)
    check_prefill(cache, [40, 3], queries(43, 32, 8, 128, torch.bfloat16))


def test_an_fp8_cache() -> None:
    cache = paged([90, 40], 8, 128, 16, torch.bfloat16, "cuda", planes=2)
    k, v = (part.float().to(torch.float8_e4m3fn) for part in (cache.k.contiguous(), cache.v.contiguous()))
    fp8 = Paged(k, v, cache.tables, cache.contexts)
    check_decode(fp8, queries(2, 32, 8, 128, torch.bfloat16), 2)
    check_prefill(fp8, [40, 3], queries(43, 32, 8, 128, torch.bfloat16))


def test_a_captured_decode_follows_growing_contexts() -> None:
    cache = paged([900, 300, 20, 5], 8, 128, 16, torch.bfloat16, "cuda")
    contexts = cache.contexts.clone()
    q = queries(4, 32, 8, 128, torch.bfloat16)
    out = torch.zeros(4, 32 * 128, dtype=torch.bfloat16, device="cuda")
    splits = decode_splits(4, 8, 8192, 132)
    workspace = allocate_workspace(4, 32, 128, splits, q.device)

    def step() -> None:
        decode(q, cache.k, cache.v, cache.tables, cache.contexts, out, workspace, splits=splits, scale=0.1)

    cache.contexts.fill_(1)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in (contexts, contexts // 2, torch.zeros_like(contexts)):
        cache.contexts.copy_(lengths)
        graph.replay()
        torch.testing.assert_close(out.float(), attention(q, cache, [0, 1, 2, 3, 4], 0.1), atol=1.6e-2, rtol=1.6e-2)


def test_a_mixed_step() -> None:
    parts = [(1, 4000), (300, 900), (1, 1), (1, 60), (129, 129)]
    cache = paged([context for _, context in parts], 8, 128, 16, torch.bfloat16, "cuda")
    starts = [sum(length for length, _ in parts[:index]) for index in range(len(parts) + 1)]
    q = queries(starts[-1], 32, 8, 128, torch.bfloat16)
    out = torch.full((len(q), 32 * 128), torch.nan, dtype=q.dtype, device="cuda")
    picks = [(i, starts[i]) for i, (length, _) in enumerate(parts) if length == 1]
    chunks = [(i, length) for i, (length, _) in enumerate(parts) if length > 1]
    splits = decode_splits(len(picks), 8, 8192, 132)
    workspace = allocate_workspace(len(picks), 32, 128, splits, q.device)
    decode(
        q, cache.k, cache.v, cache.tables, cache.contexts, out, workspace,
        splits=splits, scale=128**-0.5, picks=torch.tensor(picks, dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    tiles = torch.tensor(prefill_tiles(chunks, tile_tokens(32, 8, 128, 2)), dtype=torch.int32, device="cuda")
    offsets = torch.tensor(starts, dtype=torch.int32, device="cuda")
    prefill(q, cache.k, cache.v, cache.tables, offsets, cache.contexts, tiles, out, scale=128**-0.5)
    expected = attention(q, cache, starts, 128**-0.5)
    torch.testing.assert_close(out.float(), expected, atol=1.6e-2, rtol=1.6e-2)
