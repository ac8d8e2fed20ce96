"""The norms of a decoder layer: which tensors of a checkpoint they are, and where they go in a slot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from morph_runtime.kernels.linear import FieldSpec
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.spec import ModelSpec


def norm_fields(spec: ModelSpec, dtype: torch.dtype) -> list[FieldSpec]:
    """What a slot of any rung holds of them."""
    fields = [FieldSpec("input_norm", (spec.hidden,), dtype), FieldSpec("post_norm", (spec.hidden,), dtype)]
    if spec.family.qk_norm is not None:
        fields.append(FieldSpec("qk_norm", (spec.heads + spec.kv_heads, spec.head_dim), dtype))
    return fields


def check_norms(spec: ModelSpec, reader: CheckpointReader, layer: int) -> None:
    """Make sure that a checkpoint has the norms of a layer.

    Raises:
        ConfigError: one is missing or has the wrong shape.
    """
    for name in (spec.family.input_norm, spec.family.post_norm):
        reader.check(name.format(layer), (spec.hidden,))
    for name in spec.family.qk_norm or ():
        reader.check(name.format(layer), (spec.head_dim,))


def read_norms(spec: ModelSpec, reader: CheckpointReader, layer: int, target: LayerWeights) -> None:
    """Read the norms of a layer into its slot; those of a head are repeated for each head."""
    reader.read_into(spec.family.input_norm.format(layer), target.input_norm)
    reader.read_into(spec.family.post_norm.format(layer), target.post_norm)
    if spec.family.qk_norm is not None and target.qk_norm is not None:
        by_head = target.qk_norm[: spec.heads], target.qk_norm[spec.heads :]
        for name, rows in zip(spec.family.qk_norm, by_head, strict=True):
            reader.read_into(name.format(layer), rows[0])
            rows[1:].copy_(rows[0].expand_as(rows[1:]))


def plain_copy(source: Tensor, target: Tensor) -> None:
    """Copy a tensor; in stream order if one of them is pinned host memory."""
    target.copy_(source, non_blocking=True)


def copy_norms(source: LayerWeights, target: LayerWeights, copy: Callable[[Tensor, Tensor], None] = plain_copy) -> None:
    """Copy the norms of the same layer at another rung; `copy` takes (source, target)."""
    copy(source.input_norm, target.input_norm)
    copy(source.post_norm, target.post_norm)
    if target.qk_norm is not None and source.qk_norm is not None:
        copy(source.qk_norm, target.qk_norm)
