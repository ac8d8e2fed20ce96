"""Causal attention of sequences with several query tokens over the paged cache.

A program takes one KV head and a tile of queries: some tokens, with all query heads that share the KV head as rows of
one matrix. It walks through the keys with a running softmax (FlashAttention-2, Dao 2023): first those that all rows
see, without masks, then those at the edges. Which tiles there are is known on the host and comes as a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from morph_runtime.kernels.cuda.attention_decode import LOG2_E
from morph_runtime.kernels.cuda.jit import kernel, kernel_with_varying, power_of_two
from morph_runtime.kernels.cuda.layout import check_cache
from morph_runtime.kernels.cuda.paging import block_numbers, for_cache, place_in_block


class PrefillTile(NamedTuple):
    """The matrices of a program."""

    rows: int
    """Query tokens times heads per KV head."""
    keys: int
    """Keys per iteration."""
    warps: int
    stages: int
    """Iterations whose loads are in flight, and the one at work."""


def prefill_tile(head_dim: int, element_bytes: int, group: int) -> PrefillTile:
    """The tile for heads of `head_dim` values of `element_bytes` bytes each, `group` of which share a KV head."""
    row_bytes = power_of_two(head_dim) * element_bytes
    if row_bytes <= 256 and element_bytes < 4:
        # Two programs of 64 rows on a multiprocessor: one does softmax while the other multiplies.
        return PrefillTile(64, 64, 4, 3) if group <= 64 else PrefillTile(128, 64, 8, 3)
    if row_bytes <= 256:  # float32 takes more room than the 99 KiB of SM86, SM89 and SM120 for what it computes
        return PrefillTile(64, 64, 4, 2)
    if row_bytes <= 512:
        return PrefillTile(64, 32, 4, 2)
    return PrefillTile(32, 16, 4, 2)


def tile_tokens(heads: int, kv_heads: int, head_dim: int, element_bytes: int) -> int:
    """Query tokens per tile.

    Raises:
        ValueError: more heads share a KV head than a tile has rows.
    """
    group = heads // kv_heads
    tokens = prefill_tile(head_dim, element_bytes, group).rows // group
    if not tokens:
        raise ValueError(f"{heads // kv_heads} query heads share a KV head: the kernel takes fewer.")
    return tokens


def prefill_tiles(lengths: Sequence[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """The tiles of a step: (sequence, number of the tile in its query), the longest work first.

    Args:
        lengths: (sequence, query tokens) of each sequence to attend for.
        tokens: query tokens per tile.
    """
    tiles = [(sequence, tile) for sequence, length in lengths for tile in range(-(-length // tokens))]
    return sorted(tiles, key=lambda item: -item[1])  # later tiles see more keys


def most_tiles(tokens: int, sequences: int, per_tile: int) -> int:
    """Tiles that any step of so many tokens and sequences may have, if sequences of one token have none; at least 1.

    Args:
        tokens: of the step.
        sequences: at most.
        per_tile: query tokens per tile.
    """
    # Each sequence has two tokens or more, and one tile that is not full.
    return max(tokens // per_tile + min(tokens // 2, sequences), 1)  # a grid must not be empty


@kernel
def _attend(
    best: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    query: tl.tensor,
    position: tl.tensor,
    table: tl.tensor,
    k_head: tl.tensor,
    v_head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    first: tl.tensor,
    window: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    scale: tl.tensor,
    DIM: tl.constexpr,
    DIM_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Keys `begin` up to `end`; of those only `first` and later are read. Unless MASKED, all rows see whole tiles."""
    column = tl.arange(0, DIM_COLUMNS)
    lane = tl.arange(0, TILE)
    # A tile's block numbers are read one iteration ahead, so that its keys and values need not wait for them.
    block = block_numbers(table, begin, lane, (begin + lane < end) & (begin + lane >= first), TILE, BLOCK_TOKENS)
    for tile in range(begin, end, TILE):
        token = tile + lane
        place = (block.to(tl.int64) * block_stride)[:, None]
        inner = (place_in_block(tile, lane, TILE, BLOCK_TOKENS) * token_stride)[:, None] + column[None, :]
        k_cell = (k_head + inner) + place  # in this order: what is in brackets may be the same for all tiles
        v_cell = (v_head + inner) + place
        if MASKED:
            block = block_numbers(table, tile + TILE, lane, token + TILE < end, TILE, BLOCK_TOKENS)
            loaded = ((token < end) & (token >= first))[:, None] & (column < DIM)[None, :]
            keys = tl.load(k_cell, mask=loaded, other=0.0)
            values = tl.load(v_cell, mask=loaded, other=0.0)
        else:
            block = block_numbers(table, tile + TILE, lane, tile + TILE < end, TILE, BLOCK_TOKENS)
            if DIM == DIM_COLUMNS:
                keys = tl.load(k_cell)
                values = tl.load(v_cell)
            else:
                keys = tl.load(k_cell, mask=(column < DIM)[None, :], other=0.0)
                values = tl.load(v_cell, mask=(column < DIM)[None, :], other=0.0)
        score = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee")
        if MASKED:
            seen = token[None, :] <= position[:, None]
            if WINDOWED:
                seen = seen & (token[None, :] > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1) * scale)  # in powers of two
        if MASKED:
            peak = tl.where(new_best > float("-inf"), new_best, 0.0)  # a row may see nothing yet
        else:
            peak = new_best
        fade = tl.exp2(best - peak)
        weight = tl.exp2(score * scale - peak[:, None])
        total = total * fade + tl.sum(weight, 1)
        mixed = mixed * fade[:, None]
        mixed = tl.dot(weight.to(query.dtype), values.to(query.dtype), mixed, input_precision="ieee")
        best = new_best
    return best, total, mixed


@kernel_with_varying(["table_stride", "window"])
def _prefill(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    tables: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    tiles: tl.tensor,
    out: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0)
    number = tl.program_id(1)
    sequence = tl.load(tiles + 2 * number)
    if sequence < 0:  # no tile; 256 of them took 78 us of a layer with 32 KV heads when they walked through it all
        return
    part = tl.load(tiles + 2 * number + 1)
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    context = tl.load(contexts + sequence)
    TOKENS: tl.constexpr = ROWS // GROUP

    row = tl.arange(0, ROWS)
    column = tl.arange(0, DIM_COLUMNS)
    index = part * TOKENS + row // GROUP
    held = ((row < TOKENS * GROUP) & (index < length))[:, None] & (column < DIM)[None, :]
    position = context - length + index
    head = kv_head * GROUP + row % GROUP
    token = (start + index).to(tl.int64)
    query = tl.load(q + token[:, None] * q_stride + (head * DIM)[:, None] + column[None, :], mask=held, other=0.0)
    query = for_cache(query, k_cache)

    lowest = context - length + part * TOKENS  # position of the tile's first token
    end = tl.minimum(lowest + TOKENS, context)  # behind its last
    common = tl.minimum((lowest + 1) // TILE * TILE, end)  # all rows see all before it, but for the window
    first = lowest * 0
    if WINDOWED:
        first = tl.maximum(lowest - window + 1, 0)
    begin = first // TILE * TILE
    table = tables + sequence.to(tl.int64) * table_stride
    k_head = k_cache + kv_head * head_stride
    v_head = v_cache + kv_head * head_stride
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM_COLUMNS], tl.float32)
    if WINDOWED:
        inner = tl.cdiv(tl.maximum(end - window, 0), TILE) * TILE  # from here on all rows see, up to `common`
        inner = tl.minimum(tl.maximum(inner, begin), tl.maximum(common, begin))
        common = tl.maximum(common, inner)
        best, total, mixed = _attend(
            best, total, mixed, query, position, table, k_head, v_head, begin, inner, first, window,
            block_stride, token_stride, scale, DIM, DIM_COLUMNS, BLOCK_TOKENS, TILE, True, True,
        )  # fmt: skip
        begin = inner
    best, total, mixed = _attend(
        best, total, mixed, query, position, table, k_head, v_head, begin, common, first, window,
        block_stride, token_stride, scale, DIM, DIM_COLUMNS, BLOCK_TOKENS, TILE, False, False,
    )  # fmt: skip
    best, total, mixed = _attend(
        best, total, mixed, query, position, table, k_head, v_head, common, end, first, window,
        block_stride, token_stride, scale, DIM, DIM_COLUMNS, BLOCK_TOKENS, TILE, True, WINDOWED,
    )  # fmt: skip
    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    out_place = out + (token[:, None] * HEADS + head[:, None]) * DIM + column[None, :]
    tl.store(out_place, mixed.to(out.dtype.element_ty), mask=held)


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    starts: Tensor,
    contexts: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int = 0,
) -> None:
    """Attend with the query tokens of the sequences that `tiles` lists; their K and V are in the cache.

    Args:
        q: [T, heads, head_dim]; the last two dimensions contiguous, rows of any stride.
        k_cache: [blocks, block_tokens, kv_heads, head_dim], q's type or float8_e4m3fn; any strides but the last.
        v_cache: as `k_cache`, same strides.
        block_tables: int32 [S, max_blocks]; only entries that a query sees are read.
        starts: int32 [S + 1]: where each sequence's tokens start in the step, and the end.
        contexts: int32 [S]: tokens in the cache, the step's own included.
        tiles: int32 [N, 2]: see `prefill_tiles`; (-1, 0): nothing, so that a captured graph may hold more than a step
            has.
        out: [T, heads * head_dim], contiguous, of q's type; rows of other sequences are left alone.
        scale: of the scores, usually head_dim ** -0.5; positive.
        window: tokens that a query sees, its own included; 0: all.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    block_tokens = check_cache(k_cache, v_cache, kv_heads, head_dim)
    if heads % kv_heads or q.stride(2) != 1 or q.stride(1) != head_dim:
        raise ValueError(f"q is {tuple(q.shape)} with strides {q.stride()}: heads must be contiguous, {kv_heads} x n.")
    if out.shape != (rows, heads * head_dim) or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)}: it must be [{rows}, {heads * head_dim}], contiguous.")
    if block_tables.stride(1) != 1 or starts.shape[0] != contexts.shape[0] + 1 or scale <= 0:
        raise ValueError("Block tables must be contiguous, starts one longer than contexts, and the scale positive.")
    tile_tokens(heads, kv_heads, head_dim, q.element_size())
    tile = prefill_tile(head_dim, q.element_size(), heads // kv_heads)
    _prefill[(kv_heads, tiles.shape[0])](
        q,
        k_cache,
        v_cache,
        block_tables,
        starts,
        contexts,
        tiles,
        out,
        q.stride(0),
        block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        scale * LOG2_E,
        window,
        heads,
        heads // kv_heads,
        head_dim,
        max(power_of_two(head_dim), 16),
        block_tokens,
        tile.rows,
        tile.keys,
        window > 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
