"""The shape of the KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from morph_runtime.memory.ledger import KVQuantum


@dataclass(frozen=True)
class KVLayout:
    """Which plane lies where. A plane is the K or the V of one layer: 2 * layer is its K, 2 * layer + 1 its V.

    A range holds `planes_per_range` consecutive planes block by block: [blocks, planes_per_range, plane], where a
    plane's block is [block_tokens, kv_heads, head_dim] and then `side_bytes`. One plane per range (layer-major) keeps
    each plane contiguous, but growth costs at least an extent in each; more planes per range make the growth quantum
    smaller where extents are large (2 MiB on a GPU), and the planes strided views.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype
    """Of an element."""
    side_bytes: int = 0
    """Bytes behind the elements of each plane of a block, for what belongs to them; whole elements."""
    planes_per_range: int = 1
    """A divisor of `num_planes`, so that all ranges are alike; see `divisor`."""

    def __post_init__(self) -> None:
        """Refuse a shape that does not come out even.

        Raises:
            ValueError: `planes_per_range` does not divide the planes, or `side_bytes` is not whole elements.
        """
        if self.planes_per_range < 1 or self.num_planes % self.planes_per_range:
            raise ValueError(f"{self.num_planes} planes cannot be cut into ranges of {self.planes_per_range}")
        if self.side_bytes < 0 or self.side_bytes % self.dtype.itemsize:
            raise ValueError(f"{self.side_bytes} bytes beside a block are not whole elements of {self.dtype}")

    @staticmethod
    def divisor(num_layers: int, wanted: int) -> int:
        """The largest `planes_per_range` not above `wanted` (at least 1) that a model of so many layers can have."""
        return next(n for n in range(min(wanted, 2 * num_layers), 0, -1) if 2 * num_layers % n == 0)

    @property
    def num_planes(self) -> int:
        """K and V of every layer."""
        return 2 * self.num_layers

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Shape of one block in one plane."""
        return (self.block_tokens, self.kv_heads, self.head_dim)

    @property
    def element_bytes(self) -> int:
        """Bytes of the elements of one block in one plane."""
        return self.block_tokens * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def plane_bytes(self) -> int:
        """Bytes of one block in one plane: its elements and what stands beside them."""
        return self.element_bytes + self.side_bytes

    @property
    def range_block_bytes(self) -> int:
        """Bytes of one block in one range."""
        return self.planes_per_range * self.plane_bytes

    @property
    def num_ranges(self) -> int:
        """Ranges of addresses, all alike."""
        return self.num_planes // self.planes_per_range

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all ranges."""
        return self.num_planes * self.plane_bytes

    def quantum(self, extent_bytes: int) -> KVQuantum:
        """The smallest growth that is whole blocks and whole extents in every range."""
        span = math.lcm(self.range_block_bytes, extent_bytes)
        return KVQuantum(blocks=span // self.range_block_bytes, extents=span // extent_bytes * self.num_ranges)
