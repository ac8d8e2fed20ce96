"""W4 on CPU: 4-bit codes in groups of 128 with scale and zero; activations stay in full precision.

Both kernels can convert the codes to scratch laid out [K, N], where every pass runs over contiguous
columns and the scales of a group broadcast over its 128 rows.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from morph_runtime.kernels.linear import FieldSpec, GroupedInt4Kernel, LinearShape, Tensors, carve
from morph_runtime.kernels.quantize import MIDDLE, dequantize_groups_int4, quantize_groups_int4
from morph_runtime.kernels.rung import GROUP


def check_groups(shape: LinearShape, device: torch.device) -> str:
    """Why no W4 kernel here can serve `shape`, or an empty text."""
    if device.type != "cpu":
        return f"it runs on cpu, not on {device.type}"
    if shape.in_features % GROUP:
        return f"'{shape.name}' has {shape.in_features} inputs, which is not a multiple of the group {GROUP}"
    return ""


@dataclass(frozen=True)
class Unpacking:
    """Views of scratch through which one shape of packed codes becomes weights; made once, used every step."""

    low: Tensor
    """uint8, the shape of the packed codes: their low halves, later minus 8"""
    high: Tensor
    """as `low`: the high halves"""
    codes: Tensor
    """int8 [2, ...]: low and high"""
    target: Tensor
    """`weight` in the order of `codes`"""
    groups: Tensor
    """`weight` as [K / 128, 128, N]"""
    weight: Tensor
    """[K, N]"""
    planes: Tensor
    """[2, K / 128, N]: free for scales and zeros once the codes are in `weight`"""
    scales: Tensor
    """[K / 128, 1, N] of `planes`"""
    zeros: Tensor
    """as `scales`"""

    def convert(self, packed: Tensor) -> None:
        """Write code - 8 of every weight into `weight`; packed uint8, shaped like `low`."""
        torch.bitwise_and(packed, 15, out=self.low)
        torch.bitwise_right_shift(packed, 4, out=self.high)
        self.target.copy_(self.codes.sub_(MIDDLE))

    def scale(self, scales: Tensor, zeros: Tensor) -> None:
        """Multiply by the scale and add the zero, in one pass; scales and zeros [K / 128, 1, N]."""
        torch.addcmul(zeros, self.groups, scales, out=self.groups)


class Int4Linear(GroupedInt4Kernel):
    """What the W4 kernels share: quantization to groups, and conversion through scratch."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._unpackings: dict[tuple[int, int, int], Unpacking] = {}

    def scratch_bytes(self, shape: LinearShape) -> int:
        """The linear in full precision, and its codes at a byte each."""
        return shape.out_features * shape.in_features * (self.dtype.itemsize + 1)

    def _unpacking(self, scratch: Tensor, packed_shape: tuple[int, ...], n: int, k: int) -> Unpacking:
        """Views for one shape; `packed_shape` has n * k / 2 elements."""
        key = (scratch.data_ptr(), n, k)
        found = self._unpackings.get(key)
        if found is None:
            weight = carve(scratch, 0, (k, n), self.dtype)
            codes = carve(scratch, weight.nbytes, (2, *packed_shape), torch.int8)
            low, high = codes.view(torch.uint8).unbind(0)
            planes = carve(scratch, weight.nbytes, (2, k // GROUP, n), self.dtype)
            found = Unpacking(
                low,
                high,
                codes,
                self._in_packed_order(weight),
                weight.view(-1, GROUP, n),
                weight,
                planes,
                planes[0][:, None],
                planes[1][:, None],
            )
            self._unpackings[key] = found
        return found

    def pack(self, weight: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Quantize and pack rows; weight [n, K]."""
        self.pack_codes(*quantize_groups_int4(weight, self.dtype), out, first_row)

    @abstractmethod
    def _in_packed_order(self, weight: Tensor) -> Tensor:
        """A view of weight [K, N] as [2, *shape of the packed codes], low halves first."""


class NibbleLinear(Int4Linear):
    """The portable W4 kernel: always converts to scratch. bfloat16 and float32, any number of rows.

    Byte [k, n] holds the code of input k of row n in its low half and that of input k + K/2 in its high half.
    """

    name = "nibble"

    @classmethod
    def can_implement(cls, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """K a multiple of 128, in bfloat16 or float32, on CPU."""
        reason = check_groups(shape, device)
        if not reason and dtype not in (torch.bfloat16, torch.float32):
            reason = f"it serves bfloat16 and float32, not {dtype}"
        return not reason, reason

    def fields(self, shape: LinearShape) -> list[FieldSpec]:
        """`codes` uint8 [K / 2, N], `scales` and `zeros` [K / 128, N]."""
        n, k = shape.out_features, shape.in_features
        return [
            FieldSpec("codes", (k // 2, n), torch.uint8),
            FieldSpec("scales", (k // GROUP, n), self.dtype),
            FieldSpec("zeros", (k // GROUP, n), self.dtype),
        ]

    def pack_codes(self, codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Pack codes [n, K]."""
        half = codes.shape[1] // 2
        last = first_row + codes.shape[0]
        packed = codes[:, half:].bitwise_left_shift(4).bitwise_or_(codes[:, :half])
        out["codes"][:, first_row:last].copy_(packed.t())
        out["scales"][:, first_row:last].copy_(scales)
        out["zeros"][:, first_row:last].copy_(zeros)

    def run(self, x: Tensor, w: Tensors, scratch: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        packed = w["codes"]
        half, n = packed.shape
        views = self._unpacking(scratch, (half, n), n, 2 * half)
        views.convert(packed)
        views.scale(w["scales"][:, None], w["zeros"][:, None])
        return torch.mm(x, views.weight)

    def _in_packed_order(self, weight: Tensor) -> Tensor:
        return weight.view(2, -1, weight.shape[1])

    def dequantize(self, w: Tensors) -> Tensor:
        """(code - 8) * scale + zero, float32 [N, K]."""
        packed = w["codes"].t()
        codes = torch.cat((packed & 15, packed >> 4), 1)
        return dequantize_groups_int4(codes, w["scales"], w["zeros"])


class AtenInt4Linear(Int4Linear):
    """ATen's packed int4 kernel up to `direct_max_tokens` tokens, scratch beyond; bfloat16 only.

    ATen's layout depends on the CPU: blocks of 64 rows with AVX-512, of 32 with AVX2. In a block, byte
    [k, j] holds row j in its low half and row j + block/2 in its high half (aten/src/ATen/native/cpu/
    int4mm_kernel.cpp). `can_implement` checks this on a known tensor and refuses any other layout.
    """

    name = "aten-int4pack"

    def __init__(self, dtype: torch.dtype, direct_max_tokens: int = 64) -> None:
        """`direct_max_tokens`: measured crossover (bench/kernels/README.md); fixed, so that results repeat."""
        super().__init__(dtype)
        self._direct_max_tokens = direct_max_tokens
        self._block = probe_int4pack_layout()[0]

    @classmethod
    def can_implement(cls, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """K a multiple of 128 and N of the block, bfloat16, on a CPU whose layout is known."""
        reason = check_groups(shape, device)
        if not reason and dtype != torch.bfloat16:
            reason = f"it serves bfloat16, not {dtype}"
        if not reason:
            block, reason = probe_int4pack_layout()
            if not reason and shape.out_features % block:
                reason = f"'{shape.name}' has {shape.out_features} outputs, not a multiple of its block {block}"
        return not reason, reason

    @property
    def row_step(self) -> int:
        """One block of rows."""
        return self._block

    def fields(self, shape: LinearShape) -> list[FieldSpec]:
        """`codes` uint8 [N, K / 2] in ATen's layout, `scales_and_zeros` [K / 128, N, 2]."""
        n, k = shape.out_features, shape.in_features
        return [
            FieldSpec("codes", (n, k // 2), torch.uint8),
            FieldSpec("scales_and_zeros", (k // GROUP, n, 2), self.dtype),
        ]

    def pack_codes(self, codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensors, first_row: int = 0) -> None:
        """Pack codes [n, K]."""
        last = first_row + codes.shape[0]
        out["codes"][first_row:last].copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
        out["scales_and_zeros"][:, first_row:last, 0].copy_(scales)
        out["scales_and_zeros"][:, first_row:last, 1].copy_(zeros)

    def run(self, x: Tensor, w: Tensors, scratch: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        codes, both = w["codes"], w["scales_and_zeros"]
        if x.shape[0] <= self._direct_max_tokens:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, both)  # type: ignore[no-any-return]
        n, half = codes.shape
        packed_shape = (n // self._block, 2 * half, self._block // 2)
        views = self._unpacking(scratch, packed_shape, n, 2 * half)
        views.convert(codes.view(packed_shape))
        views.planes.copy_(both.permute(2, 0, 1))
        views.scale(views.scales, views.zeros)
        return torch.mm(x, views.weight)

    def _in_packed_order(self, weight: Tensor) -> Tensor:
        k, n = weight.shape
        return weight.view(k, n // self._block, 2, self._block // 2).permute(2, 1, 0, 3)

    def dequantize(self, w: Tensors) -> Tensor:
        """(code - 8) * scale + zero, float32 [N, K]."""
        n, half = w["codes"].shape
        packed = w["codes"].view(n // self._block, 2 * half, self._block // 2)
        codes = torch.stack((packed & 15, packed >> 4), 1).transpose(2, 3).reshape(n, 2 * half)
        both = w["scales_and_zeros"]
        return dequantize_groups_int4(codes, both[:, :, 0], both[:, :, 1])


@cache
def probe_int4pack_layout() -> tuple[int, str]:
    """Rows per block of ATen's int4 layout on this CPU, or 0 and why the kernel cannot be used.

    A known tensor is packed and compared byte by byte, and a small product is checked.
    """
    n, k = 128, 2 * GROUP
    codes = ((torch.arange(n)[:, None] * 7 + torch.arange(k) * 3 + torch.arange(n)[:, None] // 16) % 16).int()
    x = torch.linspace(-1, 1, 3 * k).view(3, k).bfloat16()
    both = torch.linspace(0.5, 1, 4 * n).view(2, n, 2).bfloat16()
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, both)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return 0, f"ATen's int4 kernel is not usable: {str(error).splitlines()[0]}"
    wanted = x.float() @ dequantize_groups_int4(codes, both[:, :, 0], both[:, :, 1]).t()
    if not torch.allclose(found.float(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())):
        return 0, "ATen's int4 kernel gives wrong values on this machine"
    for block in (64, 32):
        rows = codes.view(n // block, 2, block // 2, k)
        expected = (rows[:, 0] | rows[:, 1] << 4).transpose(1, 2).reshape(n, k // 2).to(torch.uint8)
        if packed.dtype == torch.uint8 and packed.shape == expected.shape and torch.equal(packed, expected):
            return block, ""
    return 0, "ATen packs int4 weights in a layout that is not known here"
