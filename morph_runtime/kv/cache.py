"""The memory behind the KV blocks: tensors over reserved addresses whose tail comes and goes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from morph_runtime.errors import IntegrityError
from morph_runtime.kv.layout import KVLayout
from morph_runtime.memory.arena import ArenaExhausted, PageArena
from morph_runtime.memory.moves import Move

CHUNK_BYTES = 16 * 2**20
"""Bytes of one range that a copy or a digest has outside the cache at a time (at least one block)."""
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""What blocks are copied as: the widest type that fits."""


class KVCache:
    """K and V of every layer. Only blocks below `mapped_blocks` have memory; touching others ends the process.

    Attributes:
        quantum_blocks: blocks gained by one growth step.
        quantum_extents: physical extents that one step costs, over all ranges.
        mapped_blocks: blocks with memory, whole quanta.
        max_blocks: blocks with addresses, `max_blocks` rounded up to whole quanta.
    """

    def __init__(
        self,
        arena: PageArena,
        layout: KVLayout,
        max_blocks: int,
        zeroed: bool = True,
        send: Callable[[Sequence[tuple[int, int]]], torch.Tensor] | None = None,
    ) -> None:
        """Reserve addresses for `max_blocks` blocks; takes no memory.

        Args:
            arena: where the memory comes from; the tensors are on its device.
            layout: the shape.
            max_blocks: blocks that the cache may grow to.
            zeroed: `grow` clears what it maps. Attention that reads slots which nothing was written to, and only
                then weighs them with 0, needs it: NaN times 0 is NaN. Kernels that mask their loads do not.
            send: pairs of block ids as a tensor on the device, int64 [pairs, 2]; None: by a plain copy.

        Raises:
            ValueError: `max_blocks` is not positive, or the arena has a KV cache already.
            OSError: the address space is exhausted.
        """
        self.layout = layout
        quantum = layout.quantum(arena.extent_bytes)
        self.quantum_blocks = quantum.blocks
        self.quantum_extents = quantum.extents
        self.mapped_blocks = 0
        self._growing: tuple[int, list[Move]] | None = None
        self._arena = arena
        self._zeroed = zeroed
        self._extents_per_range = quantum.extents // layout.num_ranges
        self.max_blocks = -(-max_blocks // quantum.blocks) * quantum.blocks
        nbytes = self.max_blocks * layout.range_block_bytes
        self._ranges = [arena.reserve(f"kv.{number}", nbytes) for number in range(layout.num_ranges)]
        shape = (self.max_blocks, layout.planes_per_range, layout.plane_bytes)
        self._tensors = [arena.tensor(span, 0, shape, torch.uint8) for span in self._ranges]
        word = next(word for word in WORDS if layout.range_block_bytes % word.itemsize == 0)
        self._words = [tensor.view(self.max_blocks, -1).view(word) for tensor in self._tensors]
        self._send = send or self._copied
        self._chunk_blocks = max(1, CHUNK_BYTES // layout.range_block_bytes)

    def k(self, layer: int) -> torch.Tensor:
        """Keys of a layer, [max_blocks, block_tokens, kv_heads, head_dim]; valid for life.

        Contiguous within a block; from block to block as well if the range has but this plane and nothing beside it.
        """
        return self._elements(2 * layer)

    def v(self, layer: int) -> torch.Tensor:
        """Values of a layer, as `k`."""
        return self._elements(2 * layer + 1)

    def k_side(self, layer: int) -> torch.Tensor:
        """What stands beside the keys of a layer, uint8 [max_blocks, side_bytes]; valid for life."""
        return self._plane(2 * layer)[:, self.layout.element_bytes :]

    def v_side(self, layer: int) -> torch.Tensor:
        """What stands beside the values of a layer, as `k_side`."""
        return self._plane(2 * layer + 1)[:, self.layout.element_bytes :]

    def grow(self, quanta: int) -> None:
        """Map `quanta * quantum_blocks` more blocks, and wait for them; raises as `begin_growth`."""
        self.begin_growth(quanta)
        self.end_growth()

    def begin_growth(self, quanta: int) -> None:
        """Have `quanta * quantum_blocks` more blocks mapped; they are there after `end_growth`, which must follow.

        Raises:
            ArenaExhausted: too few free extents; nothing has changed.
            IntegrityError: it would pass `max_blocks`, or a growth is under way; nothing has changed.
            OSError: the system refused a mapping; nothing has changed. It may do so later, too: see `end_growth`.
            ValueError: `quanta` is negative.
        """
        if quanta < 0:
            raise ValueError(f"cannot grow by {quanta} quanta")
        if self.is_growing:
            raise IntegrityError("The KV cache is growing already.")
        blocks = quanta * self.quantum_blocks
        needed = quanta * self.quantum_extents
        if needed > self._arena.free_extents:  # asked here, so that a shortage leaves no range half grown
            raise ArenaExhausted(f"The KV cache needs {needed} extents, {self._arena.free_extents} are free.")
        if self.mapped_blocks + blocks > self.max_blocks:
            raise IntegrityError(f"{self.mapped_blocks} KV blocks cannot grow by {blocks}: {self.max_blocks} at most.")
        first, count = self._mapped_extents(), quanta * self._extents_per_range
        moves: list[Move] = []
        try:
            for span in self._ranges:
                moves.append(self._arena.map(span, first, count))  # noqa: PERF401 - what came before a refusal counts
        except OSError:
            self._call_off(quanta, moves)
            raise
        self._growing = quanta, moves

    @property
    def is_growing(self) -> bool:
        """Whether a growth has begun and not been ended."""
        return self._growing is not None

    @property
    def has_grown(self) -> bool:
        """Whether `end_growth` would not wait."""
        return self._growing is None or all(move.done() for move in self._growing[1])

    def end_growth(self) -> None:
        """Wait for the blocks of the growth under way.

        Raises:
            OSError: the system refused a mapping; it is as if the growth had not begun.
        """
        if self._growing is None:
            return
        (quanta, moves), self._growing = self._growing, None
        reasons = [reason for move in moves if (reason := move.failure()) is not None]
        if reasons:
            self._call_off(quanta, moves)
            raise reasons[0]
        before = self.mapped_blocks
        self.mapped_blocks += quanta * self.quantum_blocks
        if self._zeroed:
            for tensor in self._tensors:
                tensor[before : self.mapped_blocks].zero_()

    def shrink(self, quanta: int) -> None:
        """Give the tail's memory back; no block in it may be live.

        Raises:
            IntegrityError: fewer blocks are mapped, or a growth is under way; nothing has changed.
            ValueError: `quanta` is negative.
        """
        if quanta < 0:
            raise ValueError(f"cannot shrink by {quanta} quanta")
        if self.is_growing:
            raise IntegrityError("The KV cache is growing.")
        if quanta * self.quantum_blocks > self.mapped_blocks:
            raise IntegrityError(f"The KV cache has {self.mapped_blocks} blocks and cannot lose {quanta} quanta.")
        count = quanta * self._extents_per_range
        for span in self._ranges:
            self._arena.unmap(span, self._mapped_extents() - count, count)
        self.mapped_blocks -= quanta * self.quantum_blocks

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, target) in every layer. All are mapped; no id is both source and target."""
        for start in range(0, len(pairs), self._chunk_blocks):
            source, target = self._send(pairs[start : start + self._chunk_blocks]).unbind(1)
            for words in self._words:
                words.index_copy_(0, target, words.index_select(0, source))

    def digest(self, blocks: Sequence[int]) -> bytes:
        """A hash over the content of these blocks, in this order, in every layer (for checks).

        It does not depend on how planes are put into ranges.
        """
        index = torch.tensor(list(blocks), dtype=torch.int64, device=self._words[0].device)
        result = hashlib.blake2b(digest_size=16)
        for number in range(self.layout.num_planes):
            plane = self._plane(number)
            for start in range(0, len(blocks), self._chunk_blocks):
                part = plane.index_select(0, index[start : start + self._chunk_blocks])
                result.update(part.cpu().numpy().tobytes())
        return result.digest()

    def _copied(self, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        return torch.tensor(pairs, device=self._words[0].device)

    def _plane(self, number: int) -> torch.Tensor:
        """One plane, uint8 [max_blocks, plane_bytes]."""
        span, place = divmod(number, self.layout.planes_per_range)
        return self._tensors[span][:, place]

    def _elements(self, number: int) -> torch.Tensor:
        """The elements of one plane, [max_blocks, block_tokens, kv_heads, head_dim]."""
        elements = self._plane(number)[:, : self.layout.element_bytes].view(self.layout.dtype)
        return elements.view(self.max_blocks, *self.layout.block_shape)

    def _call_off(self, quanta: int, moves: Sequence[Move]) -> None:
        """Take the memory away again that came for a growth; `moves`: by range, as far as they were ordered."""
        for span, move in zip(self._ranges, moves, strict=False):
            if move.failure() is None:
                self._arena.unmap(span, self._mapped_extents(), quanta * self._extents_per_range)

    def _mapped_extents(self) -> int:
        return self.mapped_blocks // self.quantum_blocks * self._extents_per_range
