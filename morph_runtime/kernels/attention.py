"""The contract of attention over the paged KV cache, whatever the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from morph_runtime.kernels.kv_format import KVFormat


class Slice(Protocol):
    """The tokens of one sequence in a step; see models.batch.SequenceSlice."""

    @property
    def start(self) -> int:
        """Index of the first token in the step."""

    @property
    def length(self) -> int:
        """How many."""

    @property
    def context(self) -> int:
        """Tokens in the KV cache, these included."""


class PagedKV(Protocol):
    """What attention and decoder need of the KV cache; see kv.cache.KVCache."""

    def k(self, layer: int) -> Tensor:
        """Keys [max_blocks, block_tokens, kv_heads, head_dim], contiguous in a block; the same memory for life."""

    def v(self, layer: int) -> Tensor:
        """Values, as `k`."""

    def k_side(self, layer: int) -> Tensor:
        """What stands beside the keys, uint8 [max_blocks, side_bytes]; asked for only if the format has scales."""

    def v_side(self, layer: int) -> Tensor:
        """As `k_side`, of the values."""


@dataclass(frozen=True)
class AttentionShape:
    """Heads and limits of one model's attention."""

    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    max_context: int
    """Tokens of the longest sequence."""

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


Plan = TypeVar("Plan")


class PagedAttention(ABC, Generic[Plan]):
    """Causal attention of the tokens of a step over their sequences' KV. One thread at a time."""

    @classmethod
    @abstractmethod
    def can_implement(cls, shape: AttentionShape, kv_format: KVFormat) -> tuple[bool, str]:
        """Whether it serves this shape over a cache of this format; the reason when it does not, else empty."""

    @property
    @abstractmethod
    def workspace_bytes(self) -> int:
        """Memory that it holds for life."""

    @abstractmethod
    def plan(self, sequences: Sequence[Slice], block_tables: Sequence[Sequence[int]], window: int = 0) -> Plan:
        """What is the same for all layers of a step that see as far; blocks are read at `run` only.

        Args:
            sequences: the tokens of the step.
            block_tables: per sequence, the blocks of its context in order.
            window: tokens that a query sees, its own included; 0: all before it.
        """

    @abstractmethod
    def store(self, k: Tensor, v: Tensor, slots: Tensor, layer: int, plan: Plan) -> None:
        """Write the step's keys and values into the cache; in each layer before `run`.

        Args:
            k: [T, kv_heads, head_dim], rotated.
            v: as `k`.
            slots: int64 [T]: block * block_tokens + offset of each token.
            layer: whose KV.
            plan: of this step.
        """

    @abstractmethod
    def run(self, q: Tensor, layer: int, plan: Plan) -> Tensor:
        """Attend to what is stored.

        Args:
            q: [T, heads, head_dim].
            layer: whose KV.
            plan: of this step.

        Returns:
            [T, heads * head_dim], contiguous.
        """
