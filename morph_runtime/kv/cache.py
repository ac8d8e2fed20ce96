"""The memory behind the KV blocks: tensors over reserved addresses whose tail comes and goes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from morph_runtime.errors import IntegrityError
from morph_runtime.kv.layout import KVLayout
from morph_runtime.memory.arena import ArenaExhausted, PageArena

COPY_BYTES = 1 << 20
"""Memory that copying blocks takes beside them."""


class KVCache:
    """K and V of every layer. Only blocks below `mapped_blocks` have memory; touching others ends the process.

    Attributes:
        quantum_blocks: blocks gained by one growth step.
        quantum_extents: physical extents that one step costs, over all ranges.
        mapped_blocks: blocks with memory, whole quanta.
        max_blocks: blocks with addresses, `max_blocks` rounded up to whole quanta.
    """

    def __init__(self, arena: PageArena, layout: KVLayout, max_blocks: int) -> None:
        """Reserve addresses for `max_blocks` blocks; takes no memory.

        Raises:
            ValueError: `max_blocks` is not positive, or the arena has a KV cache already.
            OSError: the address space is exhausted.
        """
        self.layout = layout
        quantum = layout.quantum(arena.extent_bytes)
        self.quantum_blocks = quantum.blocks
        self.quantum_extents = quantum.extents
        self.mapped_blocks = 0
        self._arena = arena
        self._extents_per_range = quantum.extents // layout.num_ranges
        self.max_blocks = -(-max_blocks // quantum.blocks) * quantum.blocks
        nbytes = self.max_blocks * layout.range_block_bytes
        self._ranges = [
            arena.reserve(f"kv.{part}{layer}", nbytes) for layer in range(layout.num_layers) for part in "kv"
        ]
        shape = (self.max_blocks, *layout.block_shape)
        self._tensors = [arena.tensor(span, 0, shape, layout.dtype) for span in self._ranges]

    def k(self, layer: int) -> torch.Tensor:
        """Keys of a layer, [max_blocks, block_tokens, kv_heads, head_dim]; valid for life."""
        return self._tensors[2 * layer]

    def v(self, layer: int) -> torch.Tensor:
        """Values of a layer, [max_blocks, block_tokens, kv_heads, head_dim]; valid for life."""
        return self._tensors[2 * layer + 1]

    def grow(self, quanta: int) -> None:
        """Map `quanta * quantum_blocks` more blocks, zeroed (a page of weights read as KV may hold NaN).

        Raises:
            ArenaExhausted: too few free extents; nothing has changed.
            IntegrityError: it would pass `max_blocks`; nothing has changed.
            OSError: the system refused a mapping; nothing has changed.
            ValueError: `quanta` is negative.
        """
        if quanta < 0:
            raise ValueError(f"cannot grow by {quanta} quanta")
        blocks = quanta * self.quantum_blocks
        needed = quanta * self.quantum_extents
        if needed > self._arena.free_extents:  # asked here, so that a shortage leaves no range half grown
            raise ArenaExhausted(f"The KV cache needs {needed} extents, {self._arena.free_extents} are free.")
        if self.mapped_blocks + blocks > self.max_blocks:
            raise IntegrityError(f"{self.mapped_blocks} KV blocks cannot grow by {blocks}: {self.max_blocks} at most.")
        first, count = self._mapped_extents(), quanta * self._extents_per_range
        before = self.mapped_blocks
        for done, span in enumerate(self._ranges):
            try:
                self._arena.map(span, first, count)
            except OSError:
                for grown in self._ranges[:done]:
                    self._arena.unmap(grown, first, count)
                raise
            self._tensors[done][before : before + blocks].zero_()
        self.mapped_blocks += blocks

    def shrink(self, quanta: int) -> None:
        """Give the tail's memory back; no block in it may be live.

        Raises:
            IntegrityError: fewer blocks are mapped; nothing has changed.
            ValueError: `quanta` is negative.
        """
        if quanta < 0:
            raise ValueError(f"cannot shrink by {quanta} quanta")
        if quanta * self.quantum_blocks > self.mapped_blocks:
            raise IntegrityError(f"The KV cache has {self.mapped_blocks} blocks and cannot lose {quanta} quanta.")
        count = quanta * self._extents_per_range
        for span in self._ranges:
            self._arena.unmap(span, self._mapped_extents() - count, count)
        self.mapped_blocks -= quanta * self.quantum_blocks

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, target) in every layer. All are mapped; no id is both source and target.

        Takes at most `COPY_BYTES` at a time, or one block of one layer.
        """
        source = torch.tensor([s for s, _ in pairs], dtype=torch.int64)
        target = torch.tensor([t for _, t in pairs], dtype=torch.int64)
        for tensor in self._tensors:
            count = max(1, COPY_BYTES // tensor[0].nbytes)
            for at in range(0, len(pairs), count):
                some = slice(at, at + count)
                tensor.index_copy_(0, target[some], tensor.index_select(0, source[some]))

    def digest(self, blocks: Sequence[int]) -> bytes:
        """A hash over the content of these blocks, in this order, in every layer (for checks)."""
        index = torch.tensor(list(blocks), dtype=torch.int64)
        result = hashlib.blake2b(digest_size=16)
        for tensor in self._tensors:
            result.update(tensor.index_select(0, index).view(torch.uint8).numpy().tobytes())
        return result.digest()

    def _mapped_extents(self) -> int:
        return self.mapped_blocks // self.quantum_blocks * self._extents_per_range
