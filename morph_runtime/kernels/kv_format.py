"""How numbers stand in the KV cache: element types, what is kept beside a block, and the reference both ways.

A format says what is stored, not how fast: each device's attention has code of its own for the formats that it
serves (`PagedAttention.can_implement`), which gives the numbers of `encode` and `decode` here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

SCALE_DTYPE = torch.float32
"""Of the scales beside a block. Half the size would be exact enough, but make the growth quantum larger."""


class KVFormat(ABC):
    """One way to store K and V. Blocks are self-contained: all that a block needs moves with it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        """Type of the activations: what attention computes in."""

    @property
    def name(self) -> str:
        """As metrics and `EngineInfo` call it: `bfloat16`, `float32`, `fp8` or `int8`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    @abstractmethod
    def element(self) -> torch.dtype:
        """What one number is stored as."""

    @property
    def scaled(self) -> bool:
        """Whether each token and KV head has a scale, in a block's side bytes: float32 [block_tokens, kv_heads]."""
        return False

    def side_bytes(self, block_tokens: int, kv_heads: int) -> int:
        """Bytes beside the elements of a block, for K and for V each."""
        return block_tokens * kv_heads * SCALE_DTYPE.itemsize if self.scaled else 0

    @abstractmethod
    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is stored for keys or values.

        Args:
            values: floating point [T, kv_heads, head_dim].

        Returns:
            elements [T, kv_heads, head_dim] of `element`; float32 scales [T, kv_heads] if it is `scaled`.
        """

    def decode(self, elements: Tensor, scales: Tensor | None) -> Tensor:
        """The numbers that stored elements [..., head_dim] (with scales [...]) stand for: float32 [..., head_dim]."""
        values = elements.to(torch.float32)
        return values if scales is None else values * scales[..., None]


class PlainKV(KVFormat):
    """The type of the activations."""

    @property
    def element(self) -> torch.dtype:
        """As it says."""
        return self.dtype

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `KVFormat.encode`."""
        return values.to(self.dtype), None


class Fp8KV(KVFormat):
    """float8_e4m3fn with scale 1, rounded to nearest, saturating: what vLLM's `fp8` is without calibration."""

    largest: ClassVar[float] = 448.0

    @property
    def name(self) -> str:
        """As it says."""
        return "fp8"

    @property
    def element(self) -> torch.dtype:
        """4 bits of exponent, 3 of mantissa; no infinity."""
        return torch.float8_e4m3fn

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `KVFormat.encode`; beyond 448 it is 448."""
        return values.clamp(-self.largest, self.largest).to(self.element), None


class Int8KV(KVFormat):
    """Symmetric int8 with a scale per token and KV head: 4 bytes for `head_dim` elements."""

    @property
    def name(self) -> str:
        """As it says."""
        return "int8"

    @property
    def element(self) -> torch.dtype:
        """-127..127 times the scale."""
        return torch.int8

    @property
    def scaled(self) -> bool:
        """It is."""
        return True

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `KVFormat.encode`; the largest of a head is exact, to a rounding of the scale."""
        scales = torch.linalg.vector_norm(values, torch.inf, -1, dtype=SCALE_DTYPE).div_(127)
        scales.clamp_min_(torch.finfo(SCALE_DTYPE).tiny)  # a head of zeros is divided by something, too
        return (values / scales[..., None]).round_().to(torch.int8), scales


FORMATS: Mapping[str, Callable[[torch.dtype], KVFormat]] = {"auto": PlainKV, "fp8": Fp8KV, "int8": Int8KV}
"""By the names of `memory.kv_dtype`."""


def kv_scales(side: Tensor, block_tokens: int, kv_heads: int) -> Tensor:
    """The scales beside one plane: uint8 [blocks, side_bytes] -> float32 [blocks, block_tokens, kv_heads].

    The same memory; `side` is a view with contiguous rows.
    """
    return side.view(SCALE_DTYPE).view(side.shape[0], block_tokens, kv_heads)
