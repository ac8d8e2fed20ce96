from __future__ import annotations

import pytest
import torch

from kernels.cuda.oracle import attention, paged
from morph_runtime.kernels.cuda.attention_decode import allocate_workspace, decode, decode_splits

# The interpreter multiplies matrices of bfloat16 as if they were integers; tests/gpu has that type.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}


def check(
    contexts: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    block_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    splits: int = 1,
    window: int = 0,
    planes: int = 2,
    plane: int = 0,
) -> None:
    cache = paged(contexts, kv_heads, head_dim, block_tokens, dtype, planes=planes, plane=plane, window=window)
    rows = len(contexts)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    q = qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    out = torch.full((rows, heads * head_dim), torch.nan, dtype=dtype)
    workspace = allocate_workspace(rows, heads, head_dim, splits, q.device).fill_(torch.nan)
    scale = head_dim**-0.5

    decode(q, cache.k, cache.v, cache.tables, cache.contexts, out, workspace, splits=splits, scale=scale, window=window)

    expected = attention(q, cache, list(range(rows + 1)), scale, window)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (7, 1), (24, 1)], ids=["MHA", "GQA4", "GQA7", "GQA24"])
def test_decode_agrees_with_dense_attention(heads: int, kv_heads: int, splits: int) -> None:
    check([1, 16, 17, 200], heads, kv_heads, 32, splits=splits)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_sizes_and_types(head_dim: int, dtype: torch.dtype) -> None:
    check([5, 130], 4, 2, head_dim, dtype=dtype, splits=2)


@pytest.mark.parametrize("block_tokens", [8, 32, 64, 128])
def test_block_sizes(block_tokens: int) -> None:
    check([3, 150], 4, 2, 16, block_tokens=block_tokens, splits=2)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [1, 20, 64, 1000])
def test_a_window_hides_what_lies_before_it(window: int, splits: int) -> None:
    check([1, 63, 64, 300], 4, 2, 16, window=window, splits=splits)


def test_a_layer_may_be_a_plane_of_a_range_of_several_layers() -> None:
    check([40, 90], 4, 2, 16, planes=8, plane=4, splits=2)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_padding_row_gives_zeros(splits: int) -> None:
    check([0, 33, 0], 4, 2, 16, splits=splits)


@pytest.mark.parametrize("idle", [0, 3])
@pytest.mark.parametrize("splits", [1, 2])
def test_decodes_can_be_picked_out_of_a_step_with_idle_places_behind_them(splits: int, idle: int) -> None:
    cache = paged([70, 40, 9], 2, 16, 16, torch.float32)
    starts = [0, 1, 5, 6]  # decode, chunk of four tokens, decode
    q = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(1))
    out = torch.full((6, 64), 7.0)
    picks = torch.tensor([[0, 0], [2, 5], *[[0, -1]] * idle], dtype=torch.int32)

    decode(
        q,
        cache.k,
        cache.v,
        cache.tables,
        cache.contexts,
        out,
        allocate_workspace(2 + idle, 4, 16, splits, q.device),
        splits=splits,
        scale=0.25,
        picks=picks,
    )

    expected = attention(q, cache, starts, 0.25)
    torch.testing.assert_close(out[[0, 5]], expected[[0, 5]], atol=1e-5, rtol=1e-5)
    assert (out[1:5] == 7).all()


def test_an_fp8_cache_is_read_as_its_values() -> None:
    cache = paged([50, 7], 2, 16, 16, torch.float32)
    k, v = (part.nan_to_num().to(torch.float8_e4m3fn) for part in (cache.k, cache.v))
    q = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))
    out = torch.empty(2, 64)

    decode(q, k, v, cache.tables, cache.contexts, out, torch.empty(1), splits=1, scale=0.25)

    same = type(cache)(k.float(), v.float(), cache.tables, cache.contexts)
    torch.testing.assert_close(out, attention(q, same, [0, 1, 2], 0.25), atol=1e-5, rtol=1e-5)


def test_few_sequences_are_cut_into_more_parts_than_many() -> None:
    splits = [decode_splits(sequences, 8, 8192, 132) for sequences in (1, 8, 64, 256)]
    assert splits == sorted(splits, reverse=True) and splits[0] >= 16 and splits[-1] == 1


def test_short_contexts_are_not_cut() -> None:
    assert decode_splits(1, 8, 32, 132) == 1


def test_a_workspace_that_is_too_small_is_refused() -> None:
    cache = paged([50], 2, 16, 16, torch.float32)
    with pytest.raises(ValueError, match="workspace"):
        decode(
            torch.randn(1, 4, 16),
            cache.k,
            cache.v,
            cache.tables,
            cache.contexts,
            torch.empty(1, 64),
            torch.empty(1),
            splits=2,
            scale=1.0,
        )
