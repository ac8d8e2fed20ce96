"""The shape of the KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from morph_runtime.memory.ledger import KVQuantum


@dataclass(frozen=True)
class KVLayout:
    """Layer-major: each layer has one range for K and one for V, both [blocks, block_tokens, kv_heads, head_dim].

    A stock attention kernel sees one tensor per layer, and growth maps pages at each range's tail.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Shape of one block in one range."""
        return (self.block_tokens, self.kv_heads, self.head_dim)

    @property
    def range_block_bytes(self) -> int:
        """Bytes of one block in one range."""
        return self.block_tokens * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def num_ranges(self) -> int:
        """K and V of every layer."""
        return 2 * self.num_layers

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all ranges."""
        return self.num_ranges * self.range_block_bytes

    def quantum(self, extent_bytes: int) -> KVQuantum:
        """The smallest growth that is whole blocks and whole extents in every range."""
        span = math.lcm(self.range_block_bytes, extent_bytes)
        return KVQuantum(blocks=span // self.range_block_bytes, extents=span // extent_bytes * self.num_ranges)
