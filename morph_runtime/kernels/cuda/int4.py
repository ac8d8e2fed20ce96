"""W4 on a GPU: 4-bit codes in groups of 128 with scale and zero, bfloat16 tensor cores.

Few rows of x: a fused kernel that reads the codes once. Many: the weights are converted to scratch and cuBLAS
multiplies, since then the arithmetic is the limit and the conversion a small part of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from morph_runtime.kernels.cuda.checks import LOCK_ROWS, check_gpu, check_rows, check_weight, exchange
from morph_runtime.kernels.cuda.packing import pack_int4, unpack_int4
from morph_runtime.kernels.cuda.products import int4_product
from morph_runtime.kernels.cuda.tiles import EDGES, Tile, pick_int4
from morph_runtime.kernels.linear import FieldSpec, GroupedInt4Kernel, LinearShape, Tensors, carve
from morph_runtime.kernels.quantize import dequantize_groups_int4
from morph_runtime.kernels.rung import GROUP

BLOCK = 64
"""Rows of W that are stored together."""

FUSED_MAX_ROWS = 256
"""Rows of x up to which the fused kernel is the faster one (bench/gpu_kernels)."""

PACK_ROWS = 32
"""Rows of W per program of the pack kernel, and of its inverse."""


class TritonInt4Linear(GroupedInt4Kernel):
    """W4 in a layout for tensor cores (see `packing`); scales and zeros are bfloat16 whatever the activations are."""

    name = "int4-triton"

    @classmethod
    def can_implement(cls, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """K a multiple of 128, in bfloat16 or float32, on a GPU from SM80 on."""
        reason = check_gpu(dtype, device, (8, 0))
        if not reason and shape.in_features % GROUP:
            reason = f"'{shape.name}' has {shape.in_features} inputs, which is not a multiple of the group {GROUP}"
        return not reason, reason

    @property
    def row_step(self) -> int:
        """One block of rows."""
        return BLOCK

    def fields(self, shape: LinearShape) -> list[FieldSpec]:
        """`codes` in blocks of 64 rows, `both` (see `packing`); `locks`: zero, for the splits of the fused kernel."""
        n, groups = shape.out_features, shape.in_features // GROUP
        return [
            FieldSpec("codes", (-(-n // BLOCK), groups, BLOCK, GROUP // 2), torch.uint8),
            FieldSpec("both", (groups, n), torch.int32),
            FieldSpec("locks", (-(-n // LOCK_ROWS),), torch.int32),
        ]

    def scratch_bytes(self, shape: LinearShape) -> int:
        """The linear in full precision, or what the splits exchange."""
        n, k = shape.out_features, shape.in_features
        return max(n * k * self.dtype.itemsize, *(pick_int4(m, n, k).partial_bytes(m, n) for m in EDGES))

    def pack(self, weight: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Quantize and pack rows in one launch; weight [n, K]."""
        codes, both, locks = out["codes"], out["both"], out["locks"]
        groups, n = both.shape
        rows, k = weight.shape
        check_weight(weight, n, GROUP * groups, first_row)
        tiny = torch.finfo(torch.bfloat16).tiny
        pack_int4[groups, -(-rows // PACK_ROWS)](weight, codes, both, locks, first_row, rows, n, k, tiny, PACK_ROWS)

    def pack_codes(self, codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Pack codes [n, K]."""
        n, k = codes.shape
        halves = codes.view(n, k // GROUP, 2, GROUP // 2)
        packed = (halves[:, :, 0] | halves[:, :, 1] << 4).view(n, k // GROUP, 4, 2, 4, 2).permute(0, 1, 4, 2, 3, 5)
        packed = packed.reshape(n, k // GROUP, GROUP // 2)
        first, whole = first_row // BLOCK, n // BLOCK
        into = out["codes"][first : first - (-n // BLOCK)].transpose(1, 2)
        into[:whole].copy_(packed[: whole * BLOCK].view(whole, BLOCK, k // GROUP, GROUP // 2))
        if whole * BLOCK < n:
            into[whole, : n - whole * BLOCK].copy_(packed[whole * BLOCK :])
        pair = torch.stack((scales, zeros), 2).to(torch.bfloat16).contiguous().view(torch.int32)
        out["both"][:, first_row : first_row + n].copy_(pair[:, :, 0])
        out["locks"][first_row // LOCK_ROWS : -(-(first_row + n) // LOCK_ROWS)].zero_()

    def run(self, x: Tensor, w: Tensors, scratch: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        groups, n = w["both"].shape
        check_rows(x, GROUP * groups, self.dtype)
        if x.shape[0] <= FUSED_MAX_ROWS and self.dtype == torch.bfloat16:
            return self.run_tile(x, w, scratch, pick_int4(x.shape[0], n, x.shape[1]))
        return F.linear(x, self.unpack(w, scratch))

    def run_tile(self, x: Tensor, w: Tensors, scratch: Tensor, tile: Tile) -> Tensor:
        """The fused product with a given tile; x [M, K] bfloat16 -> [M, N]."""
        m, k = x.shape
        n = w["both"].shape[1]
        y = torch.empty((m, n), dtype=x.dtype, device=x.device)
        partial, split = exchange(scratch, w["locks"], tile, m, n)
        int4_product[tile.grid(m, n)](
            x, w["codes"], w["both"], y, partial, w["locks"], m, n, k, tile.splits,
            tile.bm, tile.bn, split, tile.mode, x.is_cuda, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return y

    def unpack(self, w: Tensors, scratch: Tensor) -> Tensor:
        """The weights, rounded to `dtype`, in scratch: [N, K]."""
        groups, n = w["both"].shape
        weight = carve(scratch, 0, (n, GROUP * groups), self.dtype)
        unpack_int4[groups, -(-n // PACK_ROWS)](w["codes"], w["both"], weight, n, GROUP * groups, PACK_ROWS)
        return weight

    def dequantize(self, w: Tensors) -> Tensor:
        """(code - 8) * scale + zero, float32 [N, K]."""
        groups, n = w["both"].shape
        packed = w["codes"].transpose(1, 2).reshape(-1, groups, 4, 4, 2, 2)[:n]
        packed = packed.permute(0, 1, 3, 4, 2, 5).reshape(n, groups, GROUP // 2)
        codes = torch.stack((packed & 15, packed >> 4), 2).view(n, GROUP * groups)
        pair = w["both"].view(torch.bfloat16).view(groups, n, 2)
        return dequantize_groups_int4(codes, pair[:, :, 0], pair[:, :, 1])
