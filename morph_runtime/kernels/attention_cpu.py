"""Paged attention on CPU: the blocks of a group of sequences are gathered, then two batched products and a softmax.

Blocks are gathered whole, the fastest way through cold memory, then put in order of heads, so that `bmm` runs
on contiguous batches: 440 against 530 µs with SDPA at 16 sequences of 256 tokens (bench/kernels/README.md).
Queries that share a KV head are rows of one product (GQA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morph_runtime.kernels.attention import AttentionShape, PagedAttention, PagedKV, Slice

WASTE = 1.5
"""Decodes are padded to their group's longest context; a group's padded size stays below this times the real one."""
CHEAP_TOKENS = 512
"""Padding of a group that is not worth another group: about the cost of its five operations."""
MIN_WORKSPACE_TOKENS = 8192
"""Context tokens that one group of decodes may gather: keeps the workspace small and near the caches."""
SDPA_MAX_TOKENS = 1024
"""Context tokens of a group up to which `scaled_dot_product_attention` is faster: one call in place of five."""
TILE_SCORES = 2**17
"""Scores of one tile of a prefill, over all heads: keeps them in the core's cache."""


@dataclass(frozen=True)
class Visible:
    """A sequence's tokens of a step, with that part of its context that any of them sees."""

    start: int
    length: int
    context: int


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of one token each that are computed together, padded to the longest."""

    blocks: Tensor
    """int64 [B * context / block_tokens]; a table that ends early goes on with its first block"""
    mask: Tensor
    """[B * kv_heads, 1, context], 0 or -inf"""
    count: int
    context: int
    """Tokens, a multiple of block_tokens."""
    first: int
    """Index of the first token in the step if they are consecutive, else -1."""
    members: Tensor
    """int64 [B]: indices of the tokens in the step"""


@dataclass(frozen=True)
class PrefillTile:
    """Consecutive queries of a sequence, and how many keys the last of them sees."""

    first: int
    """Index of the first token in the step."""
    count: int
    keys: int
    mask: Tensor
    """[1, count * group, keys], 0 or -inf"""


@dataclass(frozen=True)
class Prefill:
    """Several tokens of one sequence."""

    rows: Tensor
    """int64 [kv_heads * context]"""
    context: int
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True)
class CpuPlan:
    """How one step is computed."""

    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[Prefill, ...]
    tokens: int
    unwritten: Tensor | None
    """int64 [n]: token slots behind the last token of blocks that this step has opened"""


class CpuPagedAttention(PagedAttention[CpuPlan]):
    """Attention on CPU in bfloat16 or float32."""

    def __init__(self, shape: AttentionShape, kv: PagedKV, layers: int, dtype: torch.dtype) -> None:
        """Allocate the workspace; the cache's tensors are looked up once."""
        self._shape = shape
        self._dtype = dtype
        self._scale = shape.head_dim**-0.5
        self._k = [kv.k(layer).view(-1, shape.head_dim) for layer in range(layers)]
        self._v = [kv.v(layer).view(-1, shape.head_dim) for layer in range(layers)]
        self._max_tokens = _workspace_tokens(shape)
        rows = self._max_tokens * shape.kv_heads
        self._first = torch.empty(rows, shape.head_dim, dtype=dtype)
        self._second = torch.empty(rows, shape.head_dim, dtype=dtype)
        self._offsets = torch.arange(shape.block_tokens)
        self._head = torch.arange(shape.kv_heads)[:, None]

    @property
    def workspace_bytes(self) -> int:
        """Room for the gathered K and V of one group or sequence."""
        return self.workspace_for(self._shape, self._dtype)

    @staticmethod
    def workspace_for(shape: AttentionShape, dtype: torch.dtype) -> int:
        """`workspace_bytes` of an instance for this shape, before there is one."""
        return 2 * _workspace_tokens(shape) * shape.kv_heads * shape.head_dim * dtype.itemsize

    def plan(self, sequences: Sequence[Slice], block_tables: Sequence[Sequence[int]], window: int = 0) -> CpuPlan:
        """Group the decodes by context length, cut the prefills into tiles. Blocks before a window are not gathered."""
        decodes = [i for i, part in enumerate(sequences) if part.length == 1]
        with torch.inference_mode():
            unwritten = self._unwritten(sequences, block_tables)
            if window:
                sequences, block_tables = self._within(sequences, block_tables, window)
            parts = [self._plan_group(g, sequences, block_tables, window) for g in self._group(decodes, sequences)]
            groups = tuple(parts)
            prefills = tuple(
                self._plan_prefill(part, table, window)
                for part, table in zip(sequences, block_tables, strict=True)
                if part.length > 1
            )
        return CpuPlan(groups, prefills, sum(part.length for part in sequences), unwritten)

    def store(self, k: Tensor, v: Tensor, slots: Tensor, layer: int, plan: CpuPlan) -> None:
        """Write k and v [T, kv_heads, head_dim]; slots int64 [T]. Blocks that the step opens are zero behind them."""
        heads = (-1, self._shape.kv_heads, self._shape.head_dim)
        for cache, new in ((self._k[layer].view(heads), k), (self._v[layer].view(heads), v)):
            cache.index_copy_(0, slots, new)
            if plan.unwritten is not None:
                cache.index_fill_(0, plan.unwritten, 0)

    def run(self, q: Tensor, layer: int, plan: CpuPlan) -> Tensor:
        """q [T, heads, head_dim] -> [T, heads * head_dim]."""
        keys, values = self._k[layer], self._v[layer]
        if len(plan.decodes) == 1 and not plan.prefills and plan.decodes[0].first == 0:
            return self._decode(q, keys, values, plan.decodes[0])
        out = torch.empty(plan.tokens, self._shape.heads * self._shape.head_dim, dtype=self._dtype)
        for group in plan.decodes:
            if group.first >= 0:
                end = group.first + group.count
                out[group.first : end] = self._decode(q[group.first : end], keys, values, group)
            else:
                out[group.members] = self._decode(q[group.members], keys, values, group)
        for prefill in plan.prefills:
            self._prefill(q, keys, values, prefill, out)
        return out

    def _within(
        self, sequences: Sequence[Slice], block_tables: Sequence[Sequence[int]], window: int
    ) -> tuple[list[Slice], list[Sequence[int]]]:
        """The same step as if each context began with the block that its first query's window begins in."""
        size = self._shape.block_tokens
        parts: list[Slice] = []
        tables: list[Sequence[int]] = []
        for part, table in zip(sequences, block_tables, strict=True):
            unseen = max(0, part.context - part.length + 1 - window) // size
            parts.append(Visible(part.start, part.length, part.context - unseen * size))
            tables.append(table[unseen:])
        return parts, tables

    def _group(self, decodes: list[int], sequences: Sequence[Slice]) -> list[list[int]]:
        """Cut decodes into groups of like context; within a group they keep the step's order."""
        groups: list[list[int]] = []
        longest = total = 0
        for i in sorted(decodes, key=lambda i: -sequences[i].context):
            context = self._round_up(sequences[i].context)
            padded = longest * (len(groups[-1]) + 1) if groups else 0
            real = total + context
            near = padded <= WASTE * real or padded - real <= CHEAP_TOKENS
            if groups and near and padded <= self._max_tokens:
                groups[-1].append(i)
                total = real
            else:
                groups.append([i])
                longest = total = context
        return [sorted(group) for group in groups]

    def _plan_group(
        self, group: list[int], sequences: Sequence[Slice], block_tables: Sequence[Sequence[int]], window: int
    ) -> DecodeGroup:
        contexts = [sequences[i].context for i in group]
        count, heads = len(group), self._shape.kv_heads
        longest = self._round_up(max(contexts))
        blocks = longest // self._shape.block_tokens
        tables = [[*block_tables[i][:blocks], *[block_tables[i][0]] * (blocks - len(block_tables[i]))] for i in group]
        ends, columns = torch.tensor(contexts)[:, None], torch.arange(longest)
        unseen = columns >= ends
        if window:
            unseen |= columns < ends - window
        mask = torch.zeros(count, longest, dtype=self._dtype).masked_fill_(unseen, -torch.inf)
        starts = [sequences[i].start for i in group]
        return DecodeGroup(
            blocks=torch.tensor(tables).view(-1),
            mask=mask[:, None].expand(count, heads, longest).reshape(count * heads, 1, longest),
            count=count,
            context=longest,
            first=starts[0] if starts[-1] - starts[0] == count - 1 else -1,
            members=torch.tensor(starts),
        )

    def _unwritten(self, sequences: Sequence[Slice], block_tables: Sequence[Sequence[int]]) -> Tensor | None:
        """Token slots of fresh blocks that decodes will gather unwritten: cleared, as they must be finite."""
        size = self._shape.block_tokens
        slots: list[int] = []
        for part, table in zip(sequences, block_tables, strict=True):
            used = part.context % size
            if used and part.length >= used:
                first = table[part.context // size] * size
                slots.extend(range(first + used, first + size))
        return torch.tensor(slots) if slots else None

    def _round_up(self, tokens: int) -> int:
        """The next multiple of a block."""
        return -(-tokens // self._shape.block_tokens) * self._shape.block_tokens

    def _plan_prefill(self, part: Slice, table: Sequence[int], window: int) -> Prefill:
        shape = self._shape
        blocks = -(-part.context // shape.block_tokens)
        slots = (torch.tensor(table[:blocks])[:, None] * shape.block_tokens + self._offsets).view(-1)[: part.context]
        history = part.context - part.length
        step = max(16, min(128, TILE_SCORES // (shape.heads * part.context)))
        # Row i of the widest tile sees `base + i + 1` keys; a narrower tile's mask is the right end of this one.
        widest = min(step, part.length)
        base = part.context - widest
        mask = torch.zeros(widest, shape.group, part.context, dtype=self._dtype)
        columns, rows = torch.arange(part.context), torch.arange(base, part.context)[:, None]
        unseen = columns > rows
        if window:
            unseen |= columns <= rows - window
        mask = mask.masked_fill_(unseen[:, None], -torch.inf).view(1, widest * shape.group, part.context)
        tiles = []
        for first in range(0, part.length, step):
            count = min(step, part.length - first)
            keys = history + first + count
            # Row i of the full mask sees base + i + 1 keys, from column `cut` on history + first + i + 1.
            cut = base - history - first
            if cut >= 0:
                tile = mask[:, : count * shape.group, cut : cut + keys]
            else:
                tile = mask[:, -count * shape.group :, part.context - keys :]
            tiles.append(PrefillTile(part.start + first, count, keys, tile))
        return Prefill((slots * shape.kv_heads + self._head).view(-1), part.context, tuple(tiles))

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup) -> Tensor:
        """q [B, heads, head_dim] -> [B, heads * head_dim]."""
        shape = self._shape
        if group.count * group.context <= SDPA_MAX_TOKENS:
            k, v = self._by_token(keys, group, self._first), self._by_token(values, group, self._second)
            mask = group.mask.view(group.count, shape.kv_heads, 1, -1)
            q = q.reshape(group.count, shape.kv_heads, -1, shape.head_dim)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(group.count, -1)
        q = q.reshape(group.count * shape.kv_heads, shape.group, shape.head_dim)
        k = self._by_head(keys, group)
        scores = torch.softmax(torch.baddbmm(group.mask, q, k.transpose(1, 2), alpha=self._scale), -1)
        return torch.bmm(scores, self._by_head(values, group)).view(group.count, -1)

    def _by_token(self, source: Tensor, group: DecodeGroup, workspace: Tensor) -> Tensor:
        """The group's blocks; source [rows, head_dim] -> [B, kv_heads, context, head_dim] in order of tokens."""
        shape = self._shape
        rows = group.count * group.context * shape.kv_heads
        gathered, block = workspace[:rows], (-1, shape.block_tokens * shape.kv_heads * shape.head_dim)
        torch.index_select(source.view(block), 0, group.blocks, out=gathered.view(block))
        return gathered.view(group.count, group.context, shape.kv_heads, shape.head_dim).transpose(1, 2)

    def _by_head(self, source: Tensor, group: DecodeGroup) -> Tensor:
        """The group's blocks; source [rows, head_dim] -> [B * kv_heads, context, head_dim], contiguous."""
        gathered = self._by_token(source, group, self._first)
        target = self._second[: gathered.shape[0] * gathered.shape[1] * gathered.shape[2]].view(gathered.shape)
        return target.copy_(gathered).view(-1, group.context, self._shape.head_dim)

    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor, prefill: Prefill, out: Tensor) -> None:
        """Write the rows of one sequence into `out` [T, heads * head_dim]; q [T, heads, head_dim]."""
        shape = self._shape
        k, v = self._first[: prefill.rows.shape[0]], self._second[: prefill.rows.shape[0]]
        torch.index_select(keys, 0, prefill.rows, out=k)
        torch.index_select(values, 0, prefill.rows, out=v)
        k = k.view(shape.kv_heads, prefill.context, shape.head_dim)
        v = v.view(shape.kv_heads, prefill.context, shape.head_dim)
        grouped = (-1, shape.kv_heads, shape.group, shape.head_dim)
        for tile in prefill.tiles:
            end = tile.first + tile.count
            queries = q[tile.first : end].reshape(grouped).transpose(0, 1).reshape(shape.kv_heads, -1, shape.head_dim)
            scores = torch.baddbmm(tile.mask, queries, k[:, : tile.keys].transpose(1, 2), alpha=self._scale)
            mixed = torch.bmm(torch.softmax(scores, -1), v[:, : tile.keys])
            mixed = mixed.view(shape.kv_heads, tile.count, shape.group, shape.head_dim).transpose(0, 1)
            out[tile.first : end].view(grouped).copy_(mixed)


def _workspace_tokens(shape: AttentionShape) -> int:
    blocks = -(-shape.max_context // shape.block_tokens)
    return max(blocks * shape.block_tokens, MIN_WORKSPACE_TOKENS)
