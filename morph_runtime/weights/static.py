"""The weights that never change precision: embedding, final norm and output matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from morph_runtime.kernels.linear import FieldSpec
from morph_runtime.weights.layout import SlotLayout
from morph_runtime.weights.packed import PackedBytes
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.spec import ModelSpec


@dataclass(frozen=True)
class StaticTensors:
    """Views of the static slot."""

    embedding: Tensor
    """[vocab, hidden]"""
    final_norm: Tensor
    """[hidden]"""
    lm_head: Tensor
    """[vocab, hidden]; the embedding itself where they are tied."""


class StaticWeights:
    """The layout of the static slot, a uint8 tensor aligned to 64 bytes."""

    def __init__(self, spec: ModelSpec, reader: CheckpointReader | PackedBytes, dtype: torch.dtype) -> None:
        """Check that the checkpoint has the tensors; a pack checks itself.

        Raises:
            ConfigError: one is missing or has the wrong shape.
        """
        self._spec, self._reader = spec, reader
        family = spec.family
        matrix, norm = (spec.vocab, spec.hidden), (spec.hidden,)
        self._names = {"embedding": family.embedding, "final_norm": family.final_norm}
        fields = [FieldSpec("embedding", matrix, dtype), FieldSpec("final_norm", norm, dtype)]
        if not spec.tied_embeddings:
            self._names["lm_head"] = family.lm_head
            fields.append(FieldSpec("lm_head", matrix, dtype))
        if isinstance(reader, CheckpointReader):
            for field in fields:
                reader.check(self._names[field.name], field.shape)
        self.layout = SlotLayout.of(fields)

    @property
    def static_bytes(self) -> int:
        """Bytes of the slot, a multiple of 64."""
        return self.layout.nbytes

    def fill(self, slot: Tensor) -> None:
        """Read everything into the slot; uint8 [>= static_bytes].

        Raises:
            ConfigError: the checkpoint has changed since it was opened.
        """
        if isinstance(self._reader, PackedBytes):
            self._reader.read_static(slot[: self.static_bytes])
            return
        views = self.layout.views(slot)
        for name, stored in self._names.items():
            self._reader.read_into(stored, views[name])

    def bind(self, slot: Tensor) -> StaticTensors:
        """Views of the slot; uint8 [>= static_bytes]."""
        views = self.layout.views(slot)
        return StaticTensors(views["embedding"], views["final_norm"], views.get("lm_head", views["embedding"]))
