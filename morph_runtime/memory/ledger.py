"""The ledger: who gets how much of the memory budget, at every level.

The layers' slots of one rung lie side by side in one range, in the order in which layers change. So the
slots in use are always an interval, and what rounding to extents wastes is one extent per rung, not one per layer.
With slots smaller than that, a level may need more extents than the one before it; as the KV cache never shrinks
on the way down, each level then leaves room for what the deeper ones need.

A down-shift maps the quantized slot before it gives the full-precision slot back, and it must work
with every KV block live. So what one such slot needs at most is kept free: staging.
What the rounding to growth quanta leaves over, less than one quantum, is the only memory that idles.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from morph_runtime.errors import ConfigError

MIN_EXTENT_BYTES = max(16 * 1024, mmap.PAGESIZE)
MAX_EXTENT_BYTES = 2 * 1024 * 1024
SLOT_ALIGNMENT = 256
"""Bytes: where a slot may begin. Vector loads and tensor cores want 128 at most."""
MAX_EXTENTS = 8192
MIN_CONTEXT = 64
"""Tokens of base KV capacity under which serving makes no sense."""
GIB = 2**30


@dataclass(frozen=True)
class KVQuantum:
    """The smallest step by which the KV cache grows: blocks gained, extents it costs over all its ranges."""

    blocks: int
    extents: int


def slot_stride(slot_bytes: int) -> int:
    """Bytes from one slot of a rung to the next."""
    return -(-slot_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def slot_pieces(slot_bytes: int, extent_bytes: int, first: int, last: int) -> range:
    """The pieces of a rung's range that hold any byte of the slots `first` .. `last` - 1."""
    stride = slot_stride(slot_bytes)
    if last <= first:
        return range(0)
    return range(first * stride // extent_bytes, -(-last * stride // extent_bytes))


@dataclass(frozen=True)
class Ledger:
    """The cut of the budget, in extents."""

    extent_bytes: int
    total_extents: int
    static_extents: int
    slot_bytes: Mapping[str, int]
    """One layer, by rung."""
    ladder: Sequence[str]
    num_layers: int
    quantum: KVQuantum
    workspace_bytes: int = 0
    """Scratch, activations and logits: outside the arena, within the budget."""

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena."""
        return self.total_extents * self.extent_bytes

    @property
    def budget_bytes(self) -> int:
        """Bytes of arena and workspace: what the engine takes beyond the bare process."""
        return self.arena_bytes + self.workspace_bytes

    @cached_property
    def staging_extents(self) -> int:
        """Kept free for the next down-shift."""
        return max(
            len(self._pieces(rung, 0, place + 1)) - len(self._pieces(rung, 0, place))
            for rung in self.ladder
            for place in range(self.num_layers)
        )

    @property
    def max_level(self) -> int:
        """The deepest level."""
        return self.num_layers * len(self.ladder)

    def weight_extents(self, level: int) -> int:
        """Extents of all decoder layers at a level."""
        done, partial = divmod(level, self.num_layers)
        rungs = ["full", *self.ladder]
        shallow = len(self._pieces(rungs[done], partial, self.num_layers))
        return shallow + (len(self._pieces(rungs[done + 1], 0, partial)) if partial else 0)

    @cached_property
    def _peaks(self) -> Sequence[int]:
        """By level: the most extents that the layers have at it or at any deeper one."""
        peaks = [self.weight_extents(level) for level in range(self.max_level + 1)]
        for level in range(self.max_level - 1, -1, -1):
            peaks[level] = max(peaks[level], peaks[level + 1])
        return peaks

    @property
    def fixed_extents(self) -> int:
        """What the KV cache cannot have at level 0: static weights, layers, staging."""
        return self.static_extents + self._peaks[0] + self.staging_extents

    def _pieces(self, rung: str, first: int, last: int) -> range:
        return slot_pieces(self.slot_bytes[rung], self.extent_bytes, first, last)

    def kv_blocks_at_level(self, level: int) -> int:
        """KV blocks that a level leaves room for."""
        spare = self.total_extents - self.static_extents - self._peaks[level] - self.staging_extents
        return max(0, spare) // self.quantum.extents * self.quantum.blocks

    def describe(self) -> dict[str, int]:
        """Bytes by consumer, at level 0 and at the deepest level (for logs)."""
        return {
            "budget": self.budget_bytes,
            "workspace": self.workspace_bytes,
            "static": self.static_extents * self.extent_bytes,
            "staging": self.staging_extents * self.extent_bytes,
            "weights_level_0": self.weight_extents(0) * self.extent_bytes,
            "weights_deepest": self.weight_extents(self.max_level) * self.extent_bytes,
            "kv_blocks_level_0": self.kv_blocks_at_level(0),
            "kv_blocks_deepest": self.kv_blocks_at_level(self.max_level),
        }


def auto_extent_bytes(budget_bytes: int) -> int:
    """Bytes of one extent for a budget: small enough that little idles, large enough that extents stay few.

    The smallest power of two from 16 KiB (a page, where that is larger) to 2 MiB that cuts the budget into at
    most 8192. KV blocks need not divide it: a growth quantum is whole blocks and whole extents at once.
    """
    size = MIN_EXTENT_BYTES
    while size < MAX_EXTENT_BYTES and budget_bytes > size * MAX_EXTENTS:
        size *= 2
    return size


def plan_memory(
    *,
    budget_bytes: int,
    kv_tokens: int,
    block_tokens: int,
    extent_bytes: int,
    static_bytes: int,
    slot_bytes: Mapping[str, int],
    num_layers: int,
    ladder: Sequence[str],
    quantum: KVQuantum,
    min_blocks: int,
    workspace_bytes: int = 0,
) -> Ledger:
    """Cut the budget, or make one that holds `kv_tokens` of base KV capacity if `budget_bytes` is 0.

    Raises:
        ConfigError: the budget does not hold the weights, staging and `min_blocks` KV blocks (the text names the
            least that does), or `extent_bytes` is not whole pages.
    """
    if extent_bytes <= 0 or extent_bytes % mmap.PAGESIZE:
        raise ConfigError(
            f"memory.extent_kib must be a multiple of {mmap.PAGESIZE // 1024} KiB, this machine's page, "
            f"but is {extent_bytes / 1024:g}."
        )

    def extents(nbytes: int) -> int:
        return -(-nbytes // extent_bytes)

    slots = {rung: slot_bytes[rung] for rung in ("full", *ladder)}
    bare = Ledger(extent_bytes, 0, extents(static_bytes), slots, tuple(ladder), num_layers, quantum, workspace_bytes)
    fixed = bare.fixed_extents

    def with_blocks(blocks: int) -> int:
        return fixed + -(-blocks // quantum.blocks) * quantum.extents

    if budget_bytes:
        total = (budget_bytes - workspace_bytes) // extent_bytes
    else:
        total = with_blocks(-(-kv_tokens // block_tokens))
    least = with_blocks(min_blocks)
    if total < least and not budget_bytes:
        raise ConfigError(
            f"memory.kv_tokens is {kv_tokens}, but one request of full length needs {min_blocks * block_tokens}: "
            "raise it, or lower model.max_model_len."
        )
    if total < least:
        needed = (least * extent_bytes + workspace_bytes) / GIB
        raise ConfigError(
            f"memory.budget_gib is {budget_bytes / GIB:.4g}, but this model needs at least {needed + 5e-5:.4f} GiB: "
            f"weights {fixed * extent_bytes / GIB:.4f} GiB (one layer's shift staging included), workspace "
            f"{workspace_bytes / GIB:.4f} GiB and {min_blocks} KV blocks."
        )
    return replace(bare, total_extents=total)
