"""A decoder layer ready to run: its kernels and the views of its slot."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from morph_runtime.kernels.linear import LinearKernel, LinearShape, Tensors
from morph_runtime.kernels.rung import Rung


@dataclass(frozen=True)
class BoundLinear:
    """A linear with its kernel and its tensors in a slot."""

    shape: LinearShape
    kernel: LinearKernel
    tensors: Tensors
    bias: Tensor | None
    """[N], or None."""
    input_scale: Tensor | None = None
    """[K]: multiplies the input; None: nothing does. Only AWQ's o_proj has one (weights.awq_fill)."""

    def run(self, x: Tensor, scratch: Tensor) -> Tensor:
        """x [M, K] contiguous -> [M, N]; scratch uint8, as the kernel wants it."""
        if self.input_scale is not None:
            x = x * self.input_scale
        y = self.kernel.run(x, self.tensors, scratch)
        return y if self.bias is None else y.add_(self.bias)

    def dequantize(self) -> Tensor:
        """What it multiplies its input with, input scale included: float32 [N, K]."""
        values = self.kernel.dequantize(self.tensors)
        return values if self.input_scale is None else values * self.input_scale.float()


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer, ready to run: views of a slot."""

    layer: int
    rung: Rung
    input_norm: Tensor
    """[hidden]"""
    post_norm: Tensor
    """[hidden]"""
    qkv: BoundLinear
    o: BoundLinear
    gate_up: BoundLinear
    down: BoundLinear
    qk_norm: Tensor | None = None
    """[heads + kv_heads, head_dim], for families that norm queries and keys."""

    @property
    def linears(self) -> tuple[BoundLinear, BoundLinear, BoundLinear, BoundLinear]:
        """In the order of ModelSpec.linears."""
        return self.qkv, self.o, self.gate_up, self.down
