from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.cuda.oracle import attention, paged
from morph_runtime.kernels.cuda.attention_prefill import most_tiles, prefill, prefill_tiles, tile_tokens

# The interpreter multiplies matrices of bfloat16 as if they were integers; tests/gpu has that type.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}


def check(
    parts: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    block_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    planes: int = 2,
    plane: int = 0,
) -> None:
    """A step of (query tokens, context) per sequence."""
    lengths, contexts = [length for length, _ in parts], [context for _, context in parts]
    seen = window + max(lengths) if window else 0  # what any query of a sequence may see
    cache = paged(contexts, kv_heads, head_dim, block_tokens, dtype, planes=planes, plane=plane, window=seen)
    starts = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    rows = starts[-1]
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    q = qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    out = torch.full((rows, heads * head_dim), torch.nan, dtype=dtype)
    tokens = tile_tokens(heads, kv_heads, head_dim, q.element_size())
    tiles = torch.tensor(prefill_tiles(list(enumerate(lengths)), tokens), dtype=torch.int32)
    scale = head_dim**-0.5

    prefill(
        q,
        cache.k,
        cache.v,
        cache.tables,
        torch.tensor(starts, dtype=torch.int32),
        cache.contexts,
        tiles,
        out,
        scale=scale,
        window=window,
    )

    expected = attention(q, cache, starts, scale, window)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (7, 1)], ids=["MHA", "GQA4", "GQA7"])
def test_whole_prompts_and_chunks_agree_with_dense_attention(heads: int, kv_heads: int) -> None:
    check([(1, 1), (33, 33), (70, 70), (40, 200), (1, 90)], heads, kv_heads, 32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_sizes_and_types(head_dim: int, dtype: torch.dtype) -> None:
    check([(5, 5), (20, 130)], 4, 2, head_dim, dtype=dtype)


@pytest.mark.parametrize("block_tokens", [8, 32, 64, 128])
def test_block_sizes(block_tokens: int) -> None:
    check([(3, 3), (50, 150)], 4, 2, 16, block_tokens=block_tokens)


@pytest.mark.parametrize("window", [1, 20, 64, 100, 1000])
def test_a_window_hides_what_lies_before_it(window: int) -> None:
    check([(1, 1), (150, 150), (64, 300), (5, 260)], 4, 2, 16, window=window)


def test_a_layer_may_be_a_plane_of_a_range_of_several_layers() -> None:
    check([(10, 40), (30, 30)], 4, 2, 16, planes=8, plane=4)


def test_rows_of_sequences_without_tiles_are_left_alone() -> None:
    cache = paged([40, 50], 2, 16, 16, torch.float32)
    q = torch.randn(21, 4, 16, generator=torch.Generator().manual_seed(1))
    out = torch.full((21, 64), 7.0)
    tiles = torch.tensor(prefill_tiles([(1, 20)], tile_tokens(4, 2, 16, 4)), dtype=torch.int32)
    starts = torch.tensor([0, 1, 21], dtype=torch.int32)

    prefill(q, cache.k, cache.v, cache.tables, starts, cache.contexts, tiles, out, scale=0.25)

    torch.testing.assert_close(out[1:], attention(q, cache, [0, 1, 21], 0.25)[1:], atol=1e-5, rtol=1e-5)
    assert (out[0] == 7).all()


@pytest.mark.parametrize("window", [0, 20])
def test_places_without_a_tile_read_and_write_nothing(window: int) -> None:
    cache = paged([40, 50], 2, 16, 16, torch.float32)
    q = torch.randn(24, 4, 16, generator=torch.Generator().manual_seed(1))
    out = torch.full((24, 64), 7.0)  # three rows of padding
    listed = prefill_tiles([(0, 1), (1, 20)], tile_tokens(4, 2, 16, 4))
    tiles = torch.tensor([*listed, *[(-1, 0)] * 5], dtype=torch.int32)
    starts = torch.tensor([0, 1, 21], dtype=torch.int32)

    prefill(q, cache.k, cache.v, cache.tables, starts, cache.contexts, tiles, out, scale=0.25, window=window)

    expected = attention(q[:21], cache, [0, 1, 21], 0.25, window)
    torch.testing.assert_close(out[:21], expected, atol=1e-5, rtol=1e-5)
    assert (out[21:] == 7).all()


@given(st.lists(st.integers(1, 70), min_size=1, max_size=40), st.integers(1, 128))
def test_a_step_has_no_more_tiles_than_there_are_places_for(lengths: list[int], per_tile: int) -> None:
    chunks = [(number, length) for number, length in enumerate(lengths) if length > 1]
    assert len(prefill_tiles(chunks, per_tile)) <= most_tiles(sum(lengths), len(lengths), per_tile)


def test_tiles_cover_each_query_once() -> None:
    assert sorted(prefill_tiles([(0, 33), (2, 32), (5, 1)], 32)) == [(0, 0), (0, 1), (2, 0), (5, 0)]
