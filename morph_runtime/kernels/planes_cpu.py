"""K and V of a layer as attention on CPU writes and gathers them, by format of the cache.

A quantized plane is gathered as it is stored, half the bytes of bfloat16, and becomes numbers of the activation
type in the copy that puts it in order of heads. Decodes do not multiply int8 by its scales there: these go into the
scores (for K) and into the probabilities (for V), head_dim times fewer numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from morph_runtime.kernels.attention import AttentionShape, PagedKV
from morph_runtime.kernels.kv_format import KVFormat, kv_scales


class Gathered(NamedTuple):
    """The context of some sequences, in order of heads."""

    values: Tensor
    """[B * kv_heads, context, head_dim], contiguous"""
    scales: Tensor | None
    """[B * kv_heads, 1, context]: what `values` must still be multiplied by; None: nothing"""


class Slots(NamedTuple):
    """Token slots, as contiguous planes and as strided ones count them."""

    flat: Tensor
    """int64 [n]: block * block_tokens + offset"""
    blocks: Tensor
    """int64 [n]"""
    offsets: Tensor
    """int64 [n]"""

    @staticmethod
    def of(flat: Tensor, block_tokens: int) -> Slots:
        """From block * block_tokens + offset, int64 [n]."""
        blocks = flat.div(block_tokens, rounding_mode="floor")
        return Slots(flat, blocks, flat - blocks * block_tokens)


class Workspace:
    """Room for what one group or sequence gathers; one for all layers."""

    def __init__(self, shape: AttentionShape, tokens: int, kv_format: KVFormat) -> None:
        """Room for `tokens` tokens, whole blocks."""
        rows = tokens * shape.kv_heads
        self.first = torch.empty(rows, shape.head_dim, dtype=kv_format.dtype)
        """[rows, head_dim]; a row is a token's KV head"""
        self.second = torch.empty(rows, shape.head_dim, dtype=kv_format.dtype)
        """As `first`."""
        self.stored = torch.empty(rows if _quantized(kv_format) else 0, shape.head_dim, dtype=torch.int8)
        """int8 [rows, head_dim]: quantized elements, as they are stored"""
        self.scales = torch.empty(2, rows if kv_format.scaled else 0)
        """float32 [2, rows]: as they are stored, and in order of heads"""

    @staticmethod
    def nbytes(shape: AttentionShape, tokens: int, kv_format: KVFormat) -> int:
        """Bytes of an instance, before there is one."""
        row = 2 * shape.head_dim * kv_format.dtype.itemsize
        row += shape.head_dim if _quantized(kv_format) else 0
        return tokens * shape.kv_heads * (row + (8 if kv_format.scaled else 0))


class Plane(ABC):
    """K or V of one layer."""

    @abstractmethod
    def write(self, new: Tensor, slots: Slots, unwritten: Slots | None) -> None:
        """Store `new` [T, kv_heads, head_dim] at `slots`; make what is read at `unwritten` finite."""

    @abstractmethod
    def by_token(self, blocks: Tensor, count: int, out: Tensor) -> Tensor:
        """Gather the context of sequences.

        Args:
            blocks: int64 [count * context / block_tokens], sequence after sequence.
            count: sequences.
            out: rows of `Workspace` to write.

        Returns:
            [count, kv_heads, context, head_dim] in `out`, contiguous or not.
        """

    @abstractmethod
    def by_head(self, blocks: Tensor, count: int) -> Gathered:
        """As `by_token`, contiguous in order of heads; in `Workspace.second`, until the next call."""

    @abstractmethod
    def sequence(self, blocks: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        """Gather the context of one sequence.

        Args:
            blocks: int64 [ceil(context / block_tokens)].
            rows: int64 [kv_heads * context]: (block * block_tokens + offset) * kv_heads + head.
            out: rows of `Workspace` to write.

        Returns:
            [kv_heads, context, head_dim] in `out`, contiguous in each head.
        """


class PlainPlane(Plane):
    """Contiguous, in the type of the activations."""

    def __init__(self, elements: Tensor, shape: AttentionShape, workspace: Workspace) -> None:
        """`elements`: [blocks, block_tokens, kv_heads, head_dim]."""
        self._shape, self._workspace = shape, workspace
        self._rows = elements.view(-1, shape.head_dim)
        self._tokens = elements.view(-1, shape.kv_heads, shape.head_dim)
        self._blocks = elements.view(elements.shape[0], -1)

    def write(self, new: Tensor, slots: Slots, unwritten: Slots | None) -> None:
        """See `Plane.write`."""
        self._tokens.index_copy_(0, slots.flat, new)
        if unwritten is not None:
            self._tokens.index_fill_(0, unwritten.flat, 0)

    def by_token(self, blocks: Tensor, count: int, out: Tensor) -> Tensor:
        """See `Plane.by_token`."""
        shape = self._shape
        gathered = out[: blocks.shape[0] * shape.block_tokens * shape.kv_heads]
        torch.index_select(self._blocks, 0, blocks, out=gathered.view(blocks.shape[0], -1))
        return gathered.view(count, -1, shape.kv_heads, shape.head_dim).transpose(1, 2)

    def by_head(self, blocks: Tensor, count: int) -> Gathered:
        """See `Plane.by_head`."""
        gathered = self.by_token(blocks, count, self._workspace.first)
        target = self._workspace.second[: gathered.numel() // self._shape.head_dim].view(gathered.shape)
        return Gathered(target.copy_(gathered).flatten(0, 1), None)

    def sequence(self, blocks: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        """See `Plane.sequence`."""
        gathered = out[: rows.shape[0]]
        torch.index_select(self._rows, 0, rows, out=gathered)
        return gathered.view(self._shape.kv_heads, -1, self._shape.head_dim)


class QuantizedPlane(Plane):
    """int8 or float8_e4m3fn, contiguous in a block."""

    def __init__(
        self, elements: Tensor, side: Tensor | None, kv_format: KVFormat, shape: AttentionShape, workspace: Workspace
    ) -> None:
        """`elements`: [blocks, block_tokens, kv_heads, head_dim]; `side`: uint8 [blocks, side_bytes], if scaled."""
        self._shape, self._workspace, self._format = shape, workspace, kv_format
        self._codes = elements.view(torch.int8)
        self._blocks = self._codes.flatten(1)
        self._scales = None if side is None else kv_scales(side, shape.block_tokens, shape.kv_heads)

    def write(self, new: Tensor, slots: Slots, unwritten: Slots | None) -> None:
        """See `Plane.write`. Every code is a finite number as it is read here, so only scales are cleared."""
        codes, scales = self._format.encode(new)
        self._codes.index_put_((slots.blocks, slots.offsets), codes.view(torch.int8))
        if self._scales is not None and scales is not None:
            self._scales.index_put_((slots.blocks, slots.offsets), scales)
            if unwritten is not None:
                self._scales[unwritten.blocks, unwritten.offsets] = 0

    def by_token(self, blocks: Tensor, count: int, out: Tensor) -> Tensor:
        """See `Plane.by_token`."""
        stored, scales = self._gather(blocks, count)
        values = self._widen(stored, out[: stored.numel() // self._shape.head_dim].view(stored.shape))
        if scales is not None:
            values.mul_(scales.unsqueeze(-1))
        return values.transpose(1, 2)

    def by_head(self, blocks: Tensor, count: int) -> Gathered:
        """See `Plane.by_head`."""
        return self._by_head(blocks, count, self._workspace.second)

    def sequence(self, blocks: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        """See `Plane.sequence`."""
        values, scales = self._by_head(blocks, 1, out)
        if scales is not None:
            values.mul_(scales.transpose(1, 2))
        return values[:, : rows.shape[0] // self._shape.kv_heads]

    def _by_head(self, blocks: Tensor, count: int, out: Tensor) -> Gathered:
        stored, scales = self._gather(blocks, count)
        stored = stored.transpose(1, 2)
        values = self._widen(stored, out[: stored.numel() // self._shape.head_dim].view(stored.shape)).flatten(0, 1)
        if scales is None:
            return Gathered(values, None)
        ordered = self._workspace.scales[1, : scales.numel()].view(stored.shape[:3])
        return Gathered(values, ordered.copy_(scales.transpose(1, 2)).view(values.shape[0], 1, -1))

    def _gather(self, blocks: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """As stored: int8 [count, context, kv_heads, head_dim], float32 [count, context, kv_heads]; both contiguous."""
        shape, work = self._shape, self._workspace
        rows = blocks.shape[0] * shape.block_tokens * shape.kv_heads
        stored = work.stored[:rows]
        torch.index_select(self._blocks, 0, blocks, out=stored.view(blocks.shape[0], -1))
        stored = stored.view(count, -1, shape.kv_heads, shape.head_dim)
        if self._scales is None:
            return stored, None
        scales = work.scales[0, :rows]
        torch.index_select(self._scales.flatten(1), 0, blocks, out=scales.view(blocks.shape[0], -1))
        return stored, scales.view(stored.shape[:3])

    def _widen(self, stored: Tensor, out: Tensor) -> Tensor:
        """Codes of any order, given as int8, as numbers in `out` (contiguous, same shape), without their scales."""
        return out.copy_(stored) if self._format.element == torch.int8 else widen_fp8(stored, out)


def widen_fp8(codes: Tensor, out: Tensor) -> Tensor:
    """float8_e4m3fn, given as int8, into `out` of the same shape, contiguous, bfloat16 or float32; exact.

    The code's bits go where the wider type has sign, exponent and mantissa; what differs then is the exponent's bias.
    Seven times faster than torch's conversion. The two codes of NaN read as 480 and -480.
    """
    if out.dtype == torch.bfloat16:
        word, shift, mask = torch.int16, 4, 0x87F0 - 2**16
    else:
        word, shift, mask = torch.int32, 20, 0x87F00000 - 2**32
    out.view(word).copy_(codes).bitwise_left_shift_(shift).bitwise_and_(mask)
    return out.mul_(2.0**120)


def planes(kv: PagedKV, layer: int, kv_format: KVFormat, shape: AttentionShape, workspace: Workspace) -> list[Plane]:
    """K and V of a layer."""
    if not _quantized(kv_format):
        return [PlainPlane(elements, shape, workspace) for elements in (kv.k(layer), kv.v(layer))]
    k_side, v_side = (kv.k_side(layer), kv.v_side(layer)) if kv_format.scaled else (None, None)
    parts = ((kv.k(layer), k_side), (kv.v(layer), v_side))
    return [QuantizedPlane(elements, side, kv_format, shape, workspace) for elements, side in parts]


def _quantized(kv_format: KVFormat) -> bool:
    return kv_format.element != kv_format.dtype
