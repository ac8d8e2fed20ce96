"""How the tensors of a slot follow each other in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from morph_runtime.kernels.linear import FieldSpec

ALIGNMENT = 64
"""Bytes: a cache line, and the width of an AVX-512 register."""


@dataclass(frozen=True)
class Field:
    """A piece of a slot; `offset` in bytes is a multiple of 64."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int

    def view(self, slot: Tensor) -> Tensor:
        """This piece of a slot; slot uint8 [>= slot bytes], aligned to 64 bytes."""
        return slot[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class SlotLayout:
    """The pieces of a slot in order."""

    fields: tuple[Field, ...]
    nbytes: int
    """Bytes of the slot, a multiple of 64."""

    @staticmethod
    def of(specs: Sequence[FieldSpec]) -> SlotLayout:
        """Lay out pieces one after the other, each at a multiple of 64 bytes."""
        fields, offset = [], 0
        for spec in specs:
            fields.append(Field(spec.name, offset, spec.shape, spec.dtype, spec.nbytes))
            offset += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        return SlotLayout(tuple(fields), offset)

    def views(self, slot: Tensor) -> dict[str, Tensor]:
        """Every piece of a slot by name; slot uint8 [>= nbytes]."""
        return {field.name: field.view(slot) for field in self.fields}
