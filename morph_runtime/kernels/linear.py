"""The contract of a linear layer's kernel at one rung, whatever the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from morph_runtime.kernels.activation import Fp8Rows
from morph_runtime.kernels.rung import Rung

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class LinearShape:
    """A linear y = x W^T of one decoder layer; fused projections count as one."""

    name: str
    """Name of the linear, as in errors: `qkv`, `o`, `gate_up`, `down`, `lm_head`."""
    out_features: int
    """N: rows of W."""
    in_features: int
    """K: columns of W."""


@dataclass(frozen=True)
class FieldSpec:
    """One tensor that a kernel stores for a linear."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


class LinearKernel(ABC):
    """Packs, runs and unpacks the weights of linears at one rung.

    An instance holds no weights and no state: several threads may use it at the same time, each with
    its own `scratch`.
    """

    name: ClassVar[str]
    """What configuration calls it."""
    rung: ClassVar[Rung]

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        """Type of activations, scales and scratch weights."""

    @classmethod
    @abstractmethod
    def can_implement(cls, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """Whether it serves this linear here; the text gives the reason when it does not, else is empty."""

    @abstractmethod
    def fields(self, shape: LinearShape) -> list[FieldSpec]:
        """What it stores for this linear, in storage order."""

    @property
    def row_step(self) -> int:
        """`pack` takes rows in multiples of this many, unless it gets all of them."""
        return 1

    @abstractmethod
    def pack(self, weight: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Write rows [first_row, first_row + n) of the packed linear. Deterministic; the same bytes in any chunking.

        Args:
            weight: [n, K] full precision; not changed.
            out: the tensors that `fields` lists, for the whole linear.
            first_row: a multiple of `row_step`, as is n unless the rows end there.
        """

    @abstractmethod
    def run(self, x: Tensor, w: Tensors, scratch: Tensor) -> Tensor:
        """The product x W^T.

        Args:
            x: [M, K] contiguous, of `dtype`.
            w: the tensors that `fields` lists.
            scratch: uint8 [>= scratch_bytes(shape)], 64-byte aligned, overwritten.

        Returns:
            [M, N] of `dtype`, a new tensor.
        """

    def wants_fp8(self, rows: int) -> bool:
        """Whether `run_fp8` serves x of `rows` rows better than `run`."""
        return False

    def run_fp8(self, x: Fp8Rows, w: Tensors, scratch: Tensor) -> Tensor:
        """As `run`, for rows [M, K] that are in FP8 already; only where `wants_fp8` says so."""
        raise ValueError(f"the kernel {self.name} takes no FP8 rows")

    @abstractmethod
    def dequantize(self, w: Tensors) -> Tensor:
        """Every weight's value, float32 [N, K]; `run` computes with these, rounded at most once to `dtype`."""

    def scratch_bytes(self, shape: LinearShape) -> int:
        """Bytes of scratch that `run` needs for this linear."""
        return 0


class GroupedInt4Kernel(LinearKernel):
    """A W4 kernel whose weights are (code - 8) * scale + zero, in groups of 128 along the inputs.

    Besides full-precision rows it packs codes that were made elsewhere, such as those of an AWQ checkpoint.
    """

    rung = "w4"

    @abstractmethod
    def pack_codes(self, codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Write rows [first_row, first_row + n) of the packed linear, as `pack` does.

        Args:
            codes: uint8 [n, K] in 0..15; not changed.
            scales: [K / 128, n] floating point, rounded to `dtype`.
            zeros: as `scales`.
            out: the tensors that `fields` lists, for the whole linear.
            first_row: a multiple of `row_step`, as is n unless the rows end there.
        """


def carve(scratch: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of `shape` and `dtype` over `scratch` (uint8 [n]) from byte `offset`, a multiple of 64."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return scratch[offset : offset + size].view(dtype).view(shape)
