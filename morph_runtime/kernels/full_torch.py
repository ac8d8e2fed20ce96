"""Full precision: PyTorch's own matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from morph_runtime.kernels.linear import FieldSpec, LinearKernel, LinearShape, Tensors


class TorchLinear(LinearKernel):
    """`F.linear` over the checkpoint's rows as they are."""

    name = "torch"
    rung = "full"

    @classmethod
    def can_implement(cls, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """Any shape, in bfloat16 or float32, on any device."""
        if dtype not in (torch.bfloat16, torch.float32):
            return False, f"it serves bfloat16 and float32, not {dtype}"
        return True, ""

    def fields(self, shape: LinearShape) -> list[FieldSpec]:
        """`weight` [N, K]."""
        return [FieldSpec("weight", (shape.out_features, shape.in_features), self.dtype)]

    def pack(self, weight: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Copy the rows; weight [n, K]."""
        out["weight"][first_row : first_row + weight.shape[0]].copy_(weight)

    def run(self, x: Tensor, w: Tensors, scratch: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        return F.linear(x, w["weight"])

    def dequantize(self, w: Tensors) -> Tensor:
        """The weights, float32 [N, K]."""
        return w["weight"].float()
