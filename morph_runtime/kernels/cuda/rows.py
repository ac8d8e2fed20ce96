"""W8 on a GPU: FP8 or int8 codes [N, K] as they are, with one float32 scale per output row.

One layout serves every path: our kernel of FP8 rows, PyTorch's FP8 product of very many, our kernel of
full-precision rows, and the portable path through scratch.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from morph_runtime.kernels.activation import Fp8Rows
from morph_runtime.kernels.cuda.checks import check_gpu, check_rows, check_weight, exchange, fitted, has_scaled_mm
from morph_runtime.kernels.cuda.jit import power_of_two
from morph_runtime.kernels.cuda.packing import pack_rows
from morph_runtime.kernels.cuda.products import rows_product
from morph_runtime.kernels.cuda.tiles import EDGES, LOCK_ROWS, Tile, pick_fp8, pick_rows
from morph_runtime.kernels.linear import FieldSpec, LinearKernel, LinearShape, Tensors, carve
from morph_runtime.kernels.quantize import FP8_MAX

STEP = 128
"""K must be a multiple of this for the fused kernels."""


class RowsLinear(LinearKernel):
    """What the W8 kernels share."""

    rung = "w8"
    codes_dtype: ClassVar[torch.dtype]
    top: ClassVar[float]
    """The code of a row's largest magnitude."""
    kind: ClassVar[str]
    """What `rows_product` calls these weights beside full-precision rows."""

    def fields(self, shape: LinearShape) -> list[FieldSpec]:
        """`codes` [N, K], `scales` float32 [N]; `locks`: zero, for the splits of the fused kernels."""
        n, k = shape.out_features, shape.in_features
        return [
            FieldSpec("codes", (n, k), self.codes_dtype),
            FieldSpec("scales", (n,), torch.float32),
            FieldSpec("locks", (-(-n // LOCK_ROWS),), torch.int32),
        ]

    def scratch_bytes(self, shape: LinearShape) -> int:
        """What the splits exchange, or the linear in full precision where the fused kernels cannot serve."""
        n, k = shape.out_features, shape.in_features
        if not self._fused(k):
            return n * k * self.dtype.itemsize
        return max(pick(m, n, k).partial_bytes(m, n) for m in EDGES for pick in (pick_rows, pick_fp8))

    def pack(self, weight: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Quantize rows in one launch; weight [n, K]."""
        codes = out["codes"]
        n, k = codes.shape
        check_weight(weight, n, k, first_row)
        block = power_of_two(k)
        pack_rows[(weight.shape[0],)](
            weight, codes, out["scales"], out["locks"], first_row, k, self.top, block, self.kind == "fp8",
            weight.is_cuda, num_warps=max(1, min(block // 1024, 16)),
        )  # fmt: skip

    def run(self, x: Tensor, w: Tensors, scratch: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        codes = w["codes"]
        n, k = codes.shape
        check_rows(x, k, self.dtype)
        if self._fused(k):
            return self.run_tile(x, w, scratch, pick_rows(x.shape[0], n, k))
        weight = carve(scratch, 0, (n, k), self.dtype).copy_(codes)
        return F.linear(x, weight).mul_(w["scales"])

    def run_tile(self, x: Tensor, w: Tensors, scratch: Tensor, tile: Tile) -> Tensor:
        """The fused product with a given tile; x [M, K] bfloat16 -> [M, N]."""
        codes = w["codes"] if self.kind == "int8" else w["codes"].view(torch.uint8)
        return self._launch(x, w["scales"], codes, w, scratch, tile, self.kind)

    def _launch(
        self, x: Tensor, x_scales: Tensor, codes: Tensor, w: Tensors, scratch: Tensor, tile: Tile, kind: str
    ) -> Tensor:
        m, k = x.shape
        n = codes.shape[0]
        tile = fitted(tile, x, 1)
        y = torch.empty((m, n), dtype=self.dtype, device=x.device)
        partial, split = exchange(scratch, w["locks"], tile, m, n)
        rows_product[tile.grid(m, n)](
            x, x_scales, codes, w["scales"], y, partial, w["locks"], m, n, k, tile.splits,
            tile.bm, tile.bn, tile.bk, split, kind, tile.wide, x.is_cuda, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return y

    def _fused(self, k: int) -> bool:
        return self.dtype == torch.bfloat16 and k % STEP == 0

    def dequantize(self, w: Tensors) -> Tensor:
        """code * scale, float32 [N, K]."""
        return w["codes"].float() * w["scales"][:, None]


class TritonInt8Linear(RowsLinear):
    """W8 for GPUs without FP8: int8 codes, full-precision rows."""

    name = "int8-triton"
    codes_dtype = torch.int8
    top = 127.0
    kind = "int8"

    @classmethod
    def can_implement(cls, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """Any shape, in bfloat16 or float32, on a GPU from SM80 on."""
        reason = check_gpu(dtype, device, (8, 0))
        return not reason, reason


class Fp8Linear(RowsLinear):
    """W8 in FP8 (e4m3): W8A8 where the activations come in FP8 with a scale per row, which is faster; else W8A16."""

    name = "fp8"
    codes_dtype = torch.float8_e4m3fn
    top = FP8_MAX
    kind = "fp8"

    def __init__(self, dtype: torch.dtype, w8a8_min_rows: int = 1, own_max_rows: int = 256) -> None:
        """Measured crossovers (bench/gpu_kernels); fixed, so that results repeat.

        Args:
            dtype: of activations in full precision.
            w8a8_min_rows: rows of x from which on FP8 activations are the faster way.
            own_max_rows: FP8 rows up to which our kernel is faster than PyTorch's.
        """
        super().__init__(dtype)
        self._w8a8_min_rows, self._own_max_rows = w8a8_min_rows, own_max_rows

    @classmethod
    def can_implement(cls, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """Any shape, in bfloat16 or float32, on a GPU from SM89 on."""
        reason = check_gpu(dtype, device, (8, 9))
        return not reason, reason

    def wants_fp8(self, rows: int) -> bool:
        """From `w8a8_min_rows` on, in bfloat16."""
        return self.dtype == torch.bfloat16 and rows >= self._w8a8_min_rows

    def run_fp8(self, x: Fp8Rows, w: Tensors, scratch: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        codes = w["codes"]
        n, k = codes.shape
        check_rows(x.values, k, torch.float8_e4m3fn)
        m = x.values.shape[0]
        if m <= self._own_max_rows and k % STEP == 0:
            return self.run_fp8_tile(x, w, scratch, pick_fp8(m, n, k))
        if n % 16 == 0 and k % 16 == 0 and has_scaled_mm(codes.device):
            # Fast accumulation: sums of 8-bit products in the tensor cores' own registers, as vLLM's kernels do. At K =
            # 14,336 it adds 0.3 % of error to the 3.8 % of quantizing, and takes 10 % less time (bench/gpu_kernels).
            return torch._scaled_mm(
                x.values, codes.t(), scale_a=x.scales, scale_b=w["scales"][None, :], out_dtype=self.dtype,
                use_fast_accum=True,
            )  # fmt: skip
        if k % STEP == 0:
            return self.run_fp8_tile(x, w, scratch, pick_fp8(m, n, k))
        return self.run((x.values.float() * x.scales).to(self.dtype), w, scratch)

    def run_fp8_tile(self, x: Fp8Rows, w: Tensors, scratch: Tensor, tile: Tile) -> Tensor:
        """Our own FP8 product with a given tile; x [M, K] -> [M, N]."""
        return self._launch(x.values, x.scales, w["codes"], w, scratch, tile, "fp8x8")
