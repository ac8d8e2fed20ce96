"""Norm and activation of a decoder layer in few operations: on CPU, each one costs microseconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED_NORM_MAX_TOKENS = 128
"""Up to here the layer-norm form of RMSNorm is faster (10 against 24 µs at 1 token; bench/kernels/README.md)."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32.

    The row (x, -x) has mean 0 and variance mean(x^2), so its layer norm is RMSNorm: one fused CPU kernel
    in place of the six that F.rms_norm runs.

    Args:
        x: [T, hidden].
        weight: [hidden].

    Returns:
        [T, hidden], contiguous.
    """
    tokens, hidden = x.shape
    if tokens > FUSED_NORM_MAX_TOKENS:
        return F.rms_norm(x, (hidden,), weight, eps)
    return _mirrored_norm(x, eps) * weight


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head with a weight of its own.

    Args:
        x: [T, heads, head_dim].
        weight: [heads, head_dim].

    Returns:
        [T, heads, head_dim], contiguous.
    """
    if x.shape[0] > FUSED_NORM_MAX_TOKENS:
        return F.rms_norm(x, x.shape[2:], None, eps) * weight
    return _mirrored_norm(x, eps) * weight


def _mirrored_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension."""
    size = x.shape[-1]
    return F.layer_norm(torch.cat((x, -x), -1), (2 * size,), None, None, eps)[..., :size]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up; gate_up [T, 2 * ffn], gate first -> [T, ffn], contiguous."""
    gate, up = gate_up.chunk(2, 1)
    return F.silu(gate).mul_(up)
