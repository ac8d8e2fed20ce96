"""Rotary position embedding: frequencies per scaling method, and a table of cosines and sines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeSpec:
    """The rotary embedding of a checkpoint; fields that a kind does not use keep their defaults."""

    kind: str = "default"
    """`default`, `linear`, `llama3` or `yarn` (transformers' `rope_type`)."""
    theta: float = 10000.0
    """Base of the frequencies."""
    factor: float = 1.0
    """How many times longer the context is than in pre-training."""
    original_max_positions: int = 0
    """Tokens of context in pre-training (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / this stay."""
    beta_fast: float = 32.0
    """yarn: rotations in the original context above which a frequency stays."""
    beta_slow: float = 1.0
    """yarn: rotations below which a frequency is divided by `factor`."""
    attention_factor: float = 1.0
    """yarn: multiplies cosines and sines."""
    truncate: bool = True
    """yarn: whether the bounds of the ramp are whole numbers."""


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each pair of a head, float32 [head_dim / 2].

    Formulas: transformers, `modeling_rope_utils.py`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, frequencies, head_dim)
    return frequencies


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = ((rope.original_max_positions / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn(rope: RopeSpec, frequencies: Tensor, head_dim: int) -> Tensor:
    def dimension(rotations: float) -> float:
        span = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return frequencies / rope.factor * (1 - keep) + frequencies * keep


class RopeTable:
    """Cosines and signed sines of every position up to a limit, so that a step needs one look-up."""

    def __init__(self, rope: RopeSpec, head_dim: int, max_positions: int, dtype: torch.dtype) -> None:
        """`max_positions`: tokens of the longest request; the table takes 2 * max_positions * head_dim values."""
        self._half = head_dim // 2
        self._table = torch.empty(max_positions, 2, 1, head_dim, dtype=dtype)
        frequencies = inverse_frequencies(rope, head_dim)
        step = 4096
        for first in range(0, max_positions, step):
            positions = torch.arange(first, min(first + step, max_positions)).float()
            angles = positions[:, None] * frequencies
            cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
            rows = self._table[first : first + step, :, 0]
            rows[:, 0].copy_(torch.cat((cos, cos), 1))
            rows[:, 1].copy_(torch.cat((-sin, sin), 1))

    def to(self, device: torch.device) -> RopeTable:
        """Move the table to a device; returns this."""
        self._table = self._table.to(device)
        return self

    @property
    def tensor(self) -> Tensor:
        """[max_positions, 2, 1, head_dim]: cosines, then signed sines; contiguous."""
        return self._table

    @property
    def nbytes(self) -> int:
        """Size of the table in bytes."""
        return self._table.nbytes

    @property
    def max_positions(self) -> int:
        """Positions that it knows: 0 .. max_positions - 1."""
        return int(self._table.shape[0])

    def lookup(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, [T, 1, head_dim] each; positions int64 [T]."""
        cos, sin = self._table.index_select(0, positions).unbind(1)
        return cos, sin

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x * cos + (second half, first half) * signed sin; x [T, heads, head_dim] -> the same, contiguous."""
        return torch.addcmul(x * cos, x.roll(self._half, -1), sin)
