"""Rotary embedding of a step's queries and keys, and the write of its keys and values into the paged cache."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from morph_runtime.kernels.cuda.jit import follow, kernel, overlap_options, overlaps, power_of_two
from morph_runtime.kernels.cuda.layout import check_cache

HEADS_PER_PROGRAM = 16


@kernel
def _rope_store(
    qkv: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    table: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    norm: tl.tensor,
    qkv_stride: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    FP8_CACHE: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        follow()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.arange(0, HALF)[None, :]
    slot = tl.load(slots + row).to(tl.int64)
    live = slot >= 0
    position = tl.where(live, tl.load(positions + row), 0).to(tl.int64)  # a padding row's may be anything
    dtype = qkv.dtype.element_ty

    inside = (head < HEADS + 2 * KV_HEADS) & (column < DIM // 2)
    place = qkv + row * qkv_stride + head * DIM + column
    low_raw = tl.load(place, mask=inside, other=0.0)
    high_raw = tl.load(place + DIM // 2, mask=inside, other=0.0)
    low = low_raw.to(tl.float32)
    high = high_raw.to(tl.float32)
    turned = inside & (head < HEADS + KV_HEADS)
    if NORM:
        factor = tl.rsqrt(tl.sum(low * low + high * high, 1) / DIM + eps)[:, None]
        weight = norm + head * DIM + column
        low = (low * factor).to(dtype).to(tl.float32) * tl.load(weight, mask=turned, other=0.0).to(tl.float32)
        high = (high * factor).to(dtype).to(tl.float32) * tl.load(weight + DIM // 2, mask=turned, other=0.0).to(
            tl.float32
        )
        low = low.to(dtype).to(tl.float32)
        high = high.to(dtype).to(tl.float32)
    # The table's halves hold the same cosine, and the sine with its sign: the upper half's is positive.
    angle = table + position * (2 * DIM) + column
    cos = tl.load(angle, mask=column < DIM // 2, other=0.0).to(tl.float32)
    sin = tl.load(angle + DIM + DIM // 2, mask=column < DIM // 2, other=0.0).to(tl.float32)
    low_turned = ((low * cos).to(dtype).to(tl.float32) - high * sin).to(dtype)
    high_turned = ((high * cos).to(dtype).to(tl.float32) + low * sin).to(dtype)

    is_q = turned & (head < HEADS)
    tl.store(place, low_turned, mask=is_q)
    tl.store(place + DIM // 2, high_turned, mask=is_q)

    kept = tl.maximum(slot, 0)
    cell = (kept // BLOCK_TOKENS) * block_stride + (kept % BLOCK_TOKENS) * token_stride
    is_k = turned & (head >= HEADS) & live
    is_v = inside & (head >= HEADS + KV_HEADS) & live
    k_place = k_cache + cell + (head - HEADS) * head_stride + column
    v_place = v_cache + cell + (head - HEADS - KV_HEADS) * head_stride + column
    cache = k_cache.dtype.element_ty
    if FP8_CACHE:
        low_k = tl.minimum(tl.maximum(low_turned.to(tl.float32), -448.0), 448.0).to(cache)
        high_k = tl.minimum(tl.maximum(high_turned.to(tl.float32), -448.0), 448.0).to(cache)
        low_v = tl.minimum(tl.maximum(low_raw.to(tl.float32), -448.0), 448.0).to(cache)
        high_v = tl.minimum(tl.maximum(high_raw.to(tl.float32), -448.0), 448.0).to(cache)
    else:
        low_k = low_turned.to(cache)
        high_k = high_turned.to(cache)
        low_v = low_raw.to(cache)
        high_v = high_raw.to(cache)
    tl.store(k_place, low_k, mask=is_k)
    tl.store(k_place + DIM // 2, high_k, mask=is_k)
    tl.store(v_place, low_v, mask=is_v)
    tl.store(v_place + DIM // 2, high_v, mask=is_v)


def rope_store(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    qk_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate the queries in place; write rotated keys, and values, into the cache.

    Args:
        qkv: [T, (heads + 2 * kv_heads) * head_dim], rows contiguous; the keys in it stay as they are.
        positions: int64 [T].
        slots: int64 [T]: block * block_tokens + offset; -1: a padding row, write nothing for it into the cache.
        table: [positions, 2, (1,) head_dim]: cosines and signed sines (kernels.rope.RopeTable), contiguous.
        k_cache: [blocks, block_tokens, kv_heads, head_dim] of qkv's type or float8_e4m3fn; any strides but the last.
        v_cache: as `k_cache`, same strides.
        heads: query heads.
        kv_heads: heads of K and of V.
        head_dim: even.
        qk_norm: [heads + kv_heads, head_dim]: weights of an RMSNorm of each head before the rotation.
        eps: of that norm.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows = qkv.shape[0]
    block_tokens = check_cache(k_cache, v_cache, kv_heads, head_dim)
    if qkv.dim() != 2 or qkv.shape[1] != (heads + 2 * kv_heads) * head_dim or qkv.stride(1) != 1 or head_dim % 2:
        raise ValueError(
            f"qkv is {tuple(qkv.shape)}: it must be [T, {(heads + 2 * kv_heads) * head_dim}] with contiguous rows "
            f"and an even head_dim."
        )
    if positions.shape != (rows,) or slots.shape != (rows,):
        raise ValueError(f"A step of {rows} tokens has {len(positions)} positions and {len(slots)} slots.")
    if table.shape[-1] != head_dim or table.shape[1] != 2 or not table.is_contiguous():
        raise ValueError(f"The rope table is {tuple(table.shape)}: it must be [positions, 2, {head_dim}], contiguous.")
    if qk_norm is not None and (qk_norm.shape != (heads + kv_heads, head_dim) or not qk_norm.is_contiguous()):
        raise ValueError(f"qk_norm is {tuple(qk_norm.shape)}: it must be [{heads + kv_heads}, {head_dim}], contiguous.")
    overlap = overlaps(qkv.device)
    _rope_store[(rows, -(-(heads + 2 * kv_heads) // HEADS_PER_PROGRAM))](
        qkv,
        positions,
        slots,
        table,
        k_cache,
        v_cache,
        qkv if qk_norm is None else qk_norm,
        qkv.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        eps,
        heads,
        kv_heads,
        head_dim,
        block_tokens,
        qk_norm is not None,
        k_cache.dtype == torch.float8_e4m3fn,
        HEADS_PER_PROGRAM,
        power_of_two(head_dim // 2),
        overlap,
        num_warps=4,
        **overlap_options(overlap),
    )
