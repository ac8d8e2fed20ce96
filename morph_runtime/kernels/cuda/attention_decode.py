"""Attention of one query token per sequence over the paged cache, split along the context.

One program takes all query heads that share a KV head, so that each key and value is read once, and a part of the
context; the parts are joined by log-sum-exp (the scheme of flash-decoding, Dao et al. 2023). The grid depends on the
batch and on the number of parts alone, and lengths are read on the device: a captured graph stays valid while contexts
grow.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from morph_runtime.kernels.cuda.jit import (
    follow,
    kernel,
    kernel_with_varying,
    lead,
    overlap_options,
    overlaps,
    power_of_two,
)
from morph_runtime.kernels.cuda.layout import check_cache
from morph_runtime.kernels.cuda.paging import block_numbers, for_cache, place_in_block

LOG2_E = math.log2(math.e)
MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR = 4
"""Programs to aim at per multiprocessor: enough to keep its memory requests in flight."""
BALANCED_PROGRAMS_PER_PROCESSOR = 16
"""With so many, long contexts do not keep the others waiting (B=64, mixed lengths: 17 % faster than with 4)."""
BALANCED_SPLITS = 8
"""More parts than this are not worth it for the sake of balance."""
MIN_SPLIT_TOKENS = 32
"""A shorter part costs more to start and join than it gains."""
FEW_PROGRAMS = 64
"""Sequences times KV heads up to which smaller tiles are faster, since there are more of them to share out."""


class DecodeTile(NamedTuple):
    """How a program walks through its part of a context."""

    tokens: int
    """Keys per iteration."""
    warps: int
    stages: int
    """Iterations whose loads are in flight."""


def decode_tile(head_dim: int, element_bytes: int, programs: int, query_bytes: int) -> DecodeTile:
    """The tile for a head of `head_dim` cached values of `element_bytes` bytes each; bench/gpu_kernels has the figures.

    Args:
        head_dim: values per head.
        element_bytes: bytes per cached value.
        programs: sequences times KV heads.
        query_bytes: bytes per value of a query; of float32 the cache's are made float32, which takes room.
    """
    row_bytes = power_of_two(head_dim) * element_bytes
    if element_bytes == 1 and row_bytes <= 128 and query_bytes == 2:
        return DecodeTile(32 if programs <= FEW_PROGRAMS else 64, 4, 3)
    if row_bytes <= 256:
        return DecodeTile(32 if programs <= FEW_PROGRAMS else 64, 4, 2)
    if row_bytes <= 512:
        return DecodeTile(32, 4, 3)
    return DecodeTile(16, 4, 2)


def decode_splits(sequences: int, kv_heads: int, max_context: int, processors: int) -> int:
    """Parts to cut each context into: a power of two.

    Args:
        sequences: rows of the (padded) batch.
        kv_heads: heads of K.
        max_context: tokens of the longest context to expect.
        processors: multiprocessors of the GPU.
    """
    programs = max(sequences * kv_heads, 1)
    to_fill = PROGRAMS_PER_PROCESSOR * processors // programs
    to_balance = min(BALANCED_PROGRAMS_PER_PROCESSOR * processors // programs, BALANCED_SPLITS)
    wanted = min(max(to_fill, to_balance), max_context // MIN_SPLIT_TOKENS, MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def decode_workspace_floats(sequences: int, heads: int, head_dim: int, splits: int) -> int:
    """Size of the workspace of `decode`, in float32 values."""
    return 0 if splits == 1 else sequences * heads * splits * (head_dim + 1)


@kernel
def _part(context: tl.tensor, window: tl.tensor, WINDOWED: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """First token that is seen, token where the first tile starts, and tokens per part."""
    first = context * 0
    if WINDOWED:
        first = tl.maximum(context - window, 0)
    start = first // TILE * TILE
    tiles = tl.cdiv(context - start, TILE)
    return first, start, tl.cdiv(tiles, SPLITS) * TILE


@kernel_with_varying(["table_stride", "window"])
def _decode(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    tables: tl.tensor,
    contexts: tl.tensor,
    picks: tl.tensor,
    out: tl.tensor,
    workspace: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    PICKED: tl.constexpr,
    LEADS: tl.constexpr,
) -> None:
    # This kernel's own launch does not overlap: its many programs, waiting, keep the kernel before from its end (a
    # layer's small kernels at B=1: 10.0 µs against 8.7).
    if LEADS:
        lead()
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    number = tl.program_id(2)
    sequence = number
    row = number
    if PICKED:
        sequence = tl.load(picks + 2 * number)
        row = tl.load(picks + 2 * number + 1)
    context = tl.load(contexts + sequence)
    if PICKED:
        context = tl.where(row >= 0, context, 0)
    first, start, part = _part(context, window, WINDOWED, SPLITS, TILE)
    begin = start + split * part
    end = tl.minimum(begin + part, context)

    if SPLITS == 1 or begin < end:
        group = tl.arange(0, GROUP_ROWS)
        column = tl.arange(0, DIM_COLUMNS)
        head = kv_head * GROUP + group
        held = (group < GROUP)[:, None] & (column < DIM)[None, :]
        if PICKED:
            held = held & (row >= 0)
        q_place = q + row.to(tl.int64) * q_stride + head[:, None] * DIM + column[None, :]
        query = for_cache(tl.load(q_place, mask=held, other=0.0), k_cache)  # [GROUP_ROWS, DIM_COLUMNS]
        best = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)
        mixed = tl.zeros([GROUP_ROWS, DIM_COLUMNS], tl.float32)
        table = tables + sequence.to(tl.int64) * table_stride
        k_head = k_cache + kv_head * head_stride
        v_head = v_cache + kv_head * head_stride
        # A tile's block numbers are read one iteration ahead, so that its keys and values need not wait for them.
        lane = tl.arange(0, TILE)
        block = block_numbers(table, begin, lane, (begin + lane < end) & (begin + lane >= first), TILE, BLOCK_TOKENS)
        for tile in range(begin, end, TILE):
            token = tile + lane
            seen = (token < end) & (token >= first)
            place = (block.to(tl.int64) * block_stride)[:, None]
            block = block_numbers(table, tile + TILE, lane, token + TILE < end, TILE, BLOCK_TOKENS)
            inner = (place_in_block(tile, lane, TILE, BLOCK_TOKENS) * token_stride)[:, None] + column[None, :]
            loaded = seen[:, None] & (column < DIM)[None, :]
            # In this order: what is in brackets may be the same for all tiles.
            keys = tl.load((k_head + inner) + place, mask=loaded, other=0.0).to(query.dtype)
            values = tl.load((v_head + inner) + place, mask=loaded, other=0.0).to(query.dtype)
            score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale  # in powers of two
            score = tl.where(seen[None, :], score, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, 1))
            fade = tl.exp2(best - new_best)
            weight = tl.exp2(score - new_best[:, None])
            total = total * fade + tl.sum(weight, 1)
            mixed = mixed * fade[:, None]
            mixed = tl.dot(weight.to(query.dtype), values, mixed, input_precision="ieee")
            best = new_best
        if SPLITS == 1:
            mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]  # nothing in the context: zeros
            out_place = out + (row.to(tl.int64) * HEADS + head[:, None]) * DIM + column[None, :]
            tl.store(out_place, mixed.to(out.dtype.element_ty), mask=held)
        else:
            mixed = mixed / total[:, None]
            rows = tl.num_programs(2).to(tl.int64) * HEADS * SPLITS
            line = (number.to(tl.int64) * HEADS + head) * SPLITS + split
            tl.store(workspace + line[:, None] * DIM + column[None, :], mixed, mask=held)
            tl.store(workspace + rows * DIM + line, best + tl.log2(total), mask=group < GROUP)


@kernel_with_varying(["window"])
def _join(
    contexts: tl.tensor,
    picks: tl.tensor,
    out: tl.tensor,
    workspace: tl.tensor,
    window: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    PICKED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        follow()
    head = tl.program_id(0)
    number = tl.program_id(1)
    sequence = number
    row = number
    if PICKED:
        sequence = tl.load(picks + 2 * number)
        row = tl.load(picks + 2 * number + 1)
    context = tl.load(contexts + sequence)
    if PICKED:
        context = tl.where(row >= 0, context, 0)
    _first, start, part = _part(context, window, WINDOWED, SPLITS, TILE)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, DIM_COLUMNS)
    written = start + split * part < context
    rows = tl.num_programs(1).to(tl.int64) * HEADS * SPLITS
    line = (number.to(tl.int64) * HEADS + head) * SPLITS + split
    logs = tl.load(workspace + rows * DIM + line, mask=written, other=float("-inf"))
    best = tl.max(logs, 0)
    weight = tl.exp2(logs - tl.where(context > 0, best, 0.0))
    total = tl.sum(weight, 0)
    held = written[:, None] & (column < DIM)[None, :]
    parts = tl.load(workspace + line[:, None] * DIM + column[None, :], mask=held, other=0.0)
    mixed = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    out_place = out + (row.to(tl.int64) * HEADS + head) * DIM + column
    written_to = column < DIM
    if PICKED:
        written_to = written_to & (row >= 0)
    tl.store(out_place, mixed.to(out.dtype.element_ty), mask=written_to)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    out: Tensor,
    workspace: Tensor,
    *,
    splits: int,
    scale: float,
    window: int = 0,
    picks: Tensor | None = None,
) -> None:
    """Attend with one query token per sequence. Can be captured in a CUDA graph.

    Args:
        q: [S, heads, head_dim]; the last two dimensions contiguous, rows of any stride.
        k_cache: [blocks, block_tokens, kv_heads, head_dim], q's type or float8_e4m3fn; any strides but the last.
        v_cache: as `k_cache`, same strides.
        block_tables: int32 [S, max_blocks]; only entries that a query sees are read.
        contexts: int32 [S]: tokens in the cache, the query's own included; 0: write zeros.
        out: [S, heads * head_dim], contiguous, of q's type.
        workspace: float32, at least `decode_workspace_floats` values; left as it comes.
        splits: parts of each context, a power of two; see `decode_splits`.
        scale: of the scores, usually head_dim ** -0.5.
        window: tokens that a query sees, its own included; 0: all.
        picks: int32 [N, 2]: sequence (row of `block_tables`, `contexts`) and row (of `q`, `out`) of each decode, for
            steps that hold other tokens too; row -1: nothing, so that a captured graph may hold more than a step has;
            None: sequence and row i for each i of `q`.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    block_tokens = check_cache(k_cache, v_cache, kv_heads, head_dim)
    count = rows if picks is None else picks.shape[0]
    if heads % kv_heads or q.stride(2) != 1 or q.stride(1) != head_dim:
        raise ValueError(f"q is {tuple(q.shape)} with strides {q.stride()}: heads must be contiguous, {kv_heads} x n.")
    if out.shape != (rows, heads * head_dim) or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)}: it must be [{rows}, {heads * head_dim}], contiguous.")
    if splits < 1 or splits & (splits - 1):
        raise ValueError(f"A context is cut into {splits} parts: it must be a power of two.")
    if workspace.numel() < decode_workspace_floats(count, heads, head_dim, splits):
        raise ValueError(f"{workspace.numel()} floats of workspace are too few for {count} sequences.")
    if block_tables.stride(1) != 1 or (picks is None and min(len(block_tables), len(contexts)) < rows):
        raise ValueError("There must be a block table, contiguous, and a context for each row of q.")
    tile = decode_tile(head_dim, k_cache.element_size(), count * kv_heads, q.element_size())
    columns = max(power_of_two(head_dim), 16)
    group = heads // kv_heads
    overlap = overlaps(q.device)
    _decode[(kv_heads, splits, count)](
        q,
        k_cache,
        v_cache,
        block_tables,
        contexts,
        contexts if picks is None else picks,
        out,
        workspace,
        q.stride(0),
        block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        scale * LOG2_E,
        window,
        heads,
        group,
        max(power_of_two(group), 16),
        head_dim,
        columns,
        block_tokens,
        tile.tokens,
        splits,
        window > 0,
        picks is not None,
        overlap and splits > 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        _join[(heads, count)](
            contexts,
            contexts if picks is None else picks,
            out,
            workspace,
            window,
            heads,
            head_dim,
            columns,
            tile.tokens,
            splits,
            window > 0,
            picks is not None,
            overlap,
            num_warps=2 if splits * columns <= 2048 else 4,
            **overlap_options(overlap),
        )


def allocate_workspace(sequences: int, heads: int, head_dim: int, splits: int, device: torch.device) -> Tensor:
    """A workspace that serves `decode` up to these sizes."""
    floats = decode_workspace_floats(sequences, heads, head_dim, splits)
    return torch.empty(max(floats, 1), dtype=torch.float32, device=device)
