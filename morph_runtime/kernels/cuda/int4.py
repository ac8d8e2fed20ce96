"""W4 on a GPU: 4-bit codes in groups of 128 with scale and zero, bfloat16 tensor cores.

Up to some hundred rows of x: a fused kernel that converts codes in registers. Many: the weights are converted to
scratch and cuBLAS multiplies, since then the arithmetic is the limit and the conversion a small part of it. It is done
in pieces, the next one on a stream of its own while the present one is multiplied.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from morph_runtime.kernels.cuda.checks import check_gpu, check_rows, check_weight, exchange, fitted
from morph_runtime.kernels.cuda.packing import pack_int4, unpack_int4
from morph_runtime.kernels.cuda.products import int4_product
from morph_runtime.kernels.cuda.tiles import EDGES, LOCK_ROWS, Tile, pick_int4
from morph_runtime.kernels.linear import FieldSpec, GroupedInt4Kernel, LinearShape, Tensors, carve
from morph_runtime.kernels.quantize import dequantize_groups_int4
from morph_runtime.kernels.rung import GROUP

BLOCK = 64
"""Rows of W that are stored together."""

FUSED_MAX_ROWS = 1024
"""Rows of x up to which the fused kernel is the faster one (bench/gpu_kernels)."""

PIECE_ROWS = 2048
"""Rows of W that are converted at a time, or a multiple: fewer would not fill the GPU's multiprocessors."""
PIECE_BYTES = 32 << 20
"""Larger pieces than one of PIECE_ROWS stay below this."""
PACK_ROWS = 16
"""Rows of W per program of the pack kernel, and of its inverse."""


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
        """Two pieces of the linear in full precision, or what the splits exchange."""
        n, k = shape.out_features, shape.in_features
        pieces = 2 * self._piece_rows(n, k) * k * self.dtype.itemsize
        return max(pieces, *(pick_int4(m, n, k).partial_bytes(m, n) for m in EDGES))

    def pack(self, weight: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Quantize and pack rows in one launch; weight [n, K]."""
        codes, both, locks = out["codes"], out["both"], out["locks"]
        groups, n = both.shape
        rows, k = weight.shape
        check_weight(weight, n, GROUP * groups, first_row)
        tiny = torch.finfo(torch.bfloat16).tiny
        pack_int4[groups, -(-rows // PACK_ROWS)](
            weight, codes, both, locks, first_row, rows, n, k, tiny, PACK_ROWS, weight.is_cuda, num_warps=1
        )

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
        return self._run_pieces(x, w, scratch)

    def run_tile(self, x: Tensor, w: Tensors, scratch: Tensor, tile: Tile) -> Tensor:
        """The fused product with a given tile; x [M, K] bfloat16 -> [M, N]."""
        m, k = x.shape
        n = w["both"].shape[1]
        tile = fitted(tile, x, 0.5)
        y = torch.empty((m, n), dtype=x.dtype, device=x.device)
        partial, split = exchange(scratch, w["locks"], tile, m, n)
        int4_product[tile.grid(m, n)](
            x, w["codes"], w["both"], y, partial, w["locks"], m, n, k, tile.splits,
            tile.bm, tile.bn, split, tile.mode, x.is_cuda, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return y

    def unpack(self, w: Tensors, weight: Tensor, first_row: int) -> None:
        """Write the rows from `first_row` on, rounded to `dtype`, into `weight` [rows, K]."""
        groups, n = w["both"].shape
        unpack_int4[groups, -(-weight.shape[0] // PACK_ROWS)](
            w["codes"], w["both"], weight, first_row, min(n, first_row + weight.shape[0]), n, GROUP * groups, PACK_ROWS,
            num_warps=1,
        )  # fmt: skip

    def _run_pieces(self, x: Tensor, w: Tensors, scratch: Tensor) -> Tensor:
        """x [M, K] -> [M, N] by way of scratch, two pieces of which take turns."""
        (m, k), n = x.shape, w["both"].shape[1]
        step = self._piece_rows(n, k)
        y = torch.empty((m, n), dtype=x.dtype, device=x.device)
        halves = [carve(scratch, side * step * k * self.dtype.itemsize, (step, k), self.dtype) for side in range(2)]
        if not x.is_cuda or n <= step:
            for first in range(0, n, step):
                weight = halves[0][: min(step, n - first)]
                self.unpack(w, weight, first)
                y[:, first : first + step] = F.linear(x, weight)
            return y
        steps, ahead = torch.cuda.current_stream(x.device), _side_stream(x.device)
        ahead.wait_stream(steps)
        used: list[torch.cuda.Event | None] = [None, None]
        for number, first in enumerate(range(0, n, step)):
            weight = halves[number % 2][: min(step, n - first)]
            with torch.cuda.stream(ahead if number else steps):
                if (event := used[number % 2]) is not None:
                    ahead.wait_event(event)
                self.unpack(w, weight, first)
            if number:
                steps.wait_stream(ahead)
            torch.mm(x, weight.t(), out=y[:, first : first + step])
            used[number % 2] = steps.record_event()
        return y

    def _piece_rows(self, n: int, k: int) -> int:
        fit = PIECE_BYTES // (k * self.dtype.itemsize) // PIECE_ROWS * PIECE_ROWS
        return min(max(PIECE_ROWS, fit), -(-n // BLOCK) * BLOCK)

    def dequantize(self, w: Tensors) -> Tensor:
        """(code - 8) * scale + zero, float32 [N, K]."""
        groups, n = w["both"].shape
        packed = w["codes"].transpose(1, 2).reshape(-1, groups, 4, 4, 2, 2)[:n]
        packed = packed.permute(0, 1, 3, 4, 2, 5).reshape(n, groups, GROUP // 2)
        codes = torch.stack((packed & 15, packed >> 4), 2).view(n, GROUP * groups)
        pair = w["both"].view(torch.bfloat16).view(groups, n, 2)
        return dequantize_groups_int4(codes, pair[:, :, 0], pair[:, :, 1])
