"""W8 on CPU: int8 codes with one scale per output row; activations stay in full precision.

Few tokens: ATen's packed kernel reads the codes directly. More tokens: the codes are converted to
scratch (exact: every int8 value is a bfloat16 value), a full-precision product follows, and the scale
is applied to the product's columns, which is cheaper than to the weights and rounds less.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from morph_runtime.kernels.linear import FieldSpec, LinearKernel, LinearShape, Tensors, carve
from morph_runtime.kernels.quantize import quantize_rows_int8


class Int8Linear(LinearKernel):
    """The portable W8 kernel: always converts to scratch. bfloat16 and float32."""

    name = "int8"
    rung = "w8"

    @classmethod
    def can_implement(cls, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """Any shape, in bfloat16 or float32, on CPU."""
        if device.type != "cpu":
            return False, f"it runs on cpu, not on {device.type}"
        if dtype not in (torch.bfloat16, torch.float32):
            return False, f"it serves bfloat16 and float32, not {dtype}"
        return True, ""

    def fields(self, shape: LinearShape) -> list[FieldSpec]:
        """`codes` int8 [N, K], `scales` [N]."""
        n, k = shape.out_features, shape.in_features
        return [FieldSpec("codes", (n, k), torch.int8), FieldSpec("scales", (n,), self.dtype)]

    def pack(self, weight: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Quantize rows; weight [n, K]."""
        codes, scales = quantize_rows_int8(weight, self.dtype)
        last = first_row + weight.shape[0]
        out["codes"][first_row:last].copy_(codes)
        out["scales"][first_row:last].copy_(scales)

    def run(self, x: Tensor, w: Tensors, scratch: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        codes = w["codes"]
        weight = carve(scratch, 0, (codes.shape[0], codes.shape[1]), self.dtype).copy_(codes)
        return F.linear(x, weight).mul_(w["scales"])

    def dequantize(self, w: Tensors) -> Tensor:
        """code * scale, float32 [N, K]."""
        return w["codes"].float() * w["scales"].float()[:, None]

    def scratch_bytes(self, shape: LinearShape) -> int:
        """One full-precision copy of the linear."""
        return shape.out_features * shape.in_features * self.dtype.itemsize


class AtenInt8Linear(Int8Linear):
    """Int8Linear with `aten._weight_int8pack_mm` for up to `direct_max_tokens` tokens; bfloat16 only."""

    name = "aten-int8pack"

    def __init__(self, dtype: torch.dtype, direct_max_tokens: int = 16) -> None:
        """`direct_max_tokens`: measured crossover (bench/kernels/README.md); fixed, so that results repeat."""
        super().__init__(dtype)
        self._direct_max_tokens = direct_max_tokens

    @classmethod
    def can_implement(cls, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """Any shape in bfloat16 on a CPU whose PyTorch has the kernel."""
        fits, reason = super().can_implement(shape, dtype, device)
        if not fits:
            return fits, reason
        if dtype != torch.bfloat16:
            return False, f"it serves bfloat16, not {dtype}"
        reason = _probe_int8pack()
        return not reason, reason

    def run(self, x: Tensor, w: Tensors, scratch: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        if x.shape[0] > self._direct_max_tokens:
            return super().run(x, w, scratch)
        return torch.ops.aten._weight_int8pack_mm(x, w["codes"], w["scales"])  # type: ignore[no-any-return]


@cache
def _probe_int8pack() -> str:
    """Why ATen's int8 kernel cannot be used on this machine, or an empty text; a small product is checked."""
    codes = (torch.arange(48 * 128) % 255 - 127).view(48, 128).to(torch.int8)
    scales = torch.linspace(0.01, 0.02, 48).bfloat16()
    x = torch.linspace(-1, 1, 3 * 128).view(3, 128).bfloat16()
    try:
        found = torch.ops.aten._weight_int8pack_mm(x, codes, scales)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"aten._weight_int8pack_mm is not usable: {str(error).splitlines()[0]}"
    wanted = x.float() @ (codes.float() * scales.float()[:, None]).t()
    if not torch.allclose(found.float(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())):
        return "aten._weight_int8pack_mm gives wrong values on this machine"
    return ""
