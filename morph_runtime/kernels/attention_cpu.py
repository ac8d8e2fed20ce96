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
from morph_runtime.kernels.kv_format import SCALE_DTYPE, KVFormat, PlainKV
from morph_runtime.kernels.planes_cpu import Plane, Slots, Workspace, planes

WASTE = 1.5
"""Decodes are padded to their group's longest context; a group's padded size stays below this times the real one."""
CHEAP_TOKENS = 512
"""Padding of a group that is not worth another group: about the cost of its five operations."""
MIN_WORKSPACE_TOKENS = 8192
"""Context tokens that one group of decodes may gather: keeps the workspace small and near the caches."""
SDPA_MAX_TOKENS = 1024
"""Context tokens of a group up to which `scaled_dot_product_attention` is faster: one call in place of five."""
TILE_SCORES = 2**19
"""Scores of one tile of a prefill, over all heads: they stay in the core's cache (1 MiB in bfloat16). Every tile is two
products of shapes of their own, so it must not be much less: more shapes in a step than there are cached primitives
(engine.environment) and each layer compiles them anew, which took 2.8 times as long at 512 tokens behind 512."""


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

    blocks: Tensor
    """int64 [ceil(context / block_tokens)]"""
    rows: Tensor
    """int64 [kv_heads * context]: (block * block_tokens + offset) * kv_heads + head"""
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True)
class CpuPlan:
    """How one step is computed."""

    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[Prefill, ...]
    tokens: int
    unwritten: Slots | None
    """Token slots behind the last token of blocks that this step has opened."""


class CpuPagedAttention(PagedAttention[CpuPlan]):
    """Attention on CPU in bfloat16 or float32, over a cache of any format."""

    def __init__(
        self, shape: AttentionShape, kv: PagedKV, layers: int, dtype: torch.dtype, kv_format: KVFormat | None = None
    ) -> None:
        """Allocate the workspace; the cache's tensors are looked up once.

        Args:
            shape: heads and limits.
            kv: the cache; of the format that it has, all planes contiguous if that is the plain one.
            layers: of the model.
            dtype: of the activations.
            kv_format: None: the plain one.
        """
        kv_format = kv_format or PlainKV(dtype)
        self._shape, self._format = shape, kv_format
        self._dtype = dtype
        self._scale = shape.head_dim**-0.5
        self._max_tokens = _workspace_tokens(shape)
        self._workspace = Workspace(shape, self._max_tokens, kv_format)
        self._planes = [planes(kv, layer, kv_format, shape, self._workspace) for layer in range(layers)]
        self._slots = Slots.of(torch.empty(0, dtype=torch.int64), shape.block_tokens)
        self._offsets = torch.arange(shape.block_tokens)
        self._head = torch.arange(shape.kv_heads)[:, None]

    @classmethod
    def can_implement(cls, shape: AttentionShape, kv_format: KVFormat) -> tuple[bool, str]:
        """bfloat16 and float32, every format; scales must lie at multiples of 4 bytes."""
        if kv_format.dtype not in (torch.bfloat16, torch.float32):
            return False, f"it computes in bfloat16 or float32, not in {kv_format.dtype}"
        elements = shape.block_tokens * shape.kv_heads * shape.head_dim
        if kv_format.scaled and elements % SCALE_DTYPE.itemsize:
            return False, f"a block of {shape.block_tokens} tokens has {elements} numbers, not a multiple of 4"
        return True, ""

    @property
    def workspace_bytes(self) -> int:
        """Room for the gathered K and V of one group or sequence."""
        return self.workspace_for(self._shape, self._format)

    @staticmethod
    def workspace_for(shape: AttentionShape, kv_format: KVFormat) -> int:
        """`workspace_bytes` of an instance for this shape, before there is one."""
        return Workspace.nbytes(shape, _workspace_tokens(shape), kv_format)

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
        if self._slots.flat is not slots:  # the same in all layers of a step
            self._slots = Slots.of(slots, self._shape.block_tokens)
        for plane, new in zip(self._planes[layer], (k, v), strict=True):
            plane.write(new, self._slots, plan.unwritten)

    def run(self, q: Tensor, layer: int, plan: CpuPlan) -> Tensor:
        """q [T, heads, head_dim] -> [T, heads * head_dim]."""
        keys, values = self._planes[layer]
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

    def _unwritten(self, sequences: Sequence[Slice], block_tables: Sequence[Sequence[int]]) -> Slots | None:
        """Token slots of fresh blocks that decodes will gather unwritten: cleared, as they must be finite."""
        size = self._shape.block_tokens
        slots: list[int] = []
        for part, table in zip(sequences, block_tables, strict=True):
            used = part.context % size
            if used and part.length >= used:
                first = table[part.context // size] * size
                slots.extend(range(first + used, first + size))
        return Slots.of(torch.tensor(slots), size) if slots else None

    def _round_up(self, tokens: int) -> int:
        """The next multiple of a block."""
        return -(-tokens // self._shape.block_tokens) * self._shape.block_tokens

    def _plan_prefill(self, part: Slice, table: Sequence[int], window: int) -> Prefill:
        shape = self._shape
        blocks = torch.tensor(table[: -(-part.context // shape.block_tokens)])
        slots = (blocks[:, None] * shape.block_tokens + self._offsets).view(-1)[: part.context]
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
        return Prefill(blocks, (slots * shape.kv_heads + self._head).view(-1), tuple(tiles))

    def _decode(self, q: Tensor, keys: Plane, values: Plane, group: DecodeGroup) -> Tensor:
        """q [B, heads, head_dim] -> [B, heads * head_dim]."""
        shape, work = self._shape, self._workspace
        if group.count * group.context <= SDPA_MAX_TOKENS:
            k = keys.by_token(group.blocks, group.count, work.first)
            v = values.by_token(group.blocks, group.count, work.second)
            mask = group.mask.view(group.count, shape.kv_heads, 1, -1)
            q = q.reshape(group.count, shape.kv_heads, -1, shape.head_dim)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(group.count, -1)
        q = q.reshape(group.count * shape.kv_heads, shape.group, shape.head_dim)
        gathered, scales = keys.by_head(group.blocks, group.count)
        if scales is None:
            scores = torch.baddbmm(group.mask, q, gathered.transpose(1, 2), alpha=self._scale)
        else:
            scores = torch.bmm(q, gathered.transpose(1, 2)).mul_(scales.mul_(self._scale)).add_(group.mask)
        weights = torch.softmax(scores, -1)
        gathered, scales = values.by_head(group.blocks, group.count)
        if scales is not None:
            weights = weights.mul_(scales)
        return torch.bmm(weights, gathered).view(group.count, -1)

    def _prefill(self, q: Tensor, keys: Plane, values: Plane, prefill: Prefill, out: Tensor) -> None:
        """Write the rows of one sequence into `out` [T, heads * head_dim]; q [T, heads, head_dim]."""
        shape = self._shape
        k = keys.sequence(prefill.blocks, prefill.rows, self._workspace.first)
        v = values.sequence(prefill.blocks, prefill.rows, self._workspace.second)
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
