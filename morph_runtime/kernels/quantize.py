"""Round-to-nearest quantization: the values, not their layout in memory.

Every step runs in float32 on the scales as they are stored (already rounded to the activation type),
so that the codes are the nearest ones for the scales that the kernels use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from morph_runtime.kernels.rung import GROUP

MIDDLE = 8
"""W4 codes are 0..15 and stand for (code - 8) * scale + zero: ATen's convention for its int4 kernels."""

FP8_MAX = 448.0
"""The largest value of float8_e4m3fn."""


def quantize_rows_int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale per row.

    Args:
        weight: [N, K] floating point.
        dtype: type of the scales.

    Returns:
        codes int8 [N, K] in -127..127, scales [N] of `dtype`; a row of zeros gets scale 1.
    """
    values = weight.float()
    scales = values.abs().amax(1).div_(127)
    scales = torch.where(scales > 0, scales, 1.0).to(dtype)
    scales = torch.where(scales > 0, scales, torch.finfo(dtype).tiny)
    # Not in place: `values` is the weight itself when that is float32, and it may be serving.
    codes = (values / scales.float()[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def quantize_rows_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 (e4m3), one scale per row: the largest magnitude of a row becomes 448, the format's largest value.

    Args:
        weight: [N, K] floating point.

    Returns:
        codes float8_e4m3fn [N, K], scales float32 [N]; a row of zeros gets scale 1.
    """
    values = weight.float()
    scales = values.abs().amax(1).div_(FP8_MAX)
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (values / scales[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes, scales


def quantize_groups_int4(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric 4-bit in groups of 128 along the inputs.

    Args:
        weight: [N, K] floating point, K a multiple of 128.
        dtype: type of scales and zeros.

    Returns:
        codes uint8 [N, K] in 0..15, scales and zeros [K / 128, N] of `dtype`; a constant group gets scale 1.
    """
    rows, columns = weight.shape
    values = weight.float().view(rows, columns // GROUP, GROUP)
    low, high = values.aminmax(dim=2)
    scales = (high - low).div_(15)
    varied = scales > torch.finfo(dtype).tiny
    scales = torch.where(varied, scales, 1.0).to(dtype)
    zeros = torch.where(varied, low + MIDDLE * scales.float(), low).to(dtype)
    codes = (values - zeros.float()[:, :, None]).div_(scales.float()[:, :, None])
    codes = codes.add_(MIDDLE).round_().clamp_(0, 15).to(torch.uint8)
    return codes.view(rows, columns), scales.t().contiguous(), zeros.t().contiguous()


def dequantize_groups_int4(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The values of W4 codes.

    Args:
        codes: integers [N, K] in 0..15.
        scales: [K / 128, N].
        zeros: [K / 128, N].

    Returns:
        float32 [N, K].
    """
    rows, columns = codes.shape
    values = codes.float().sub_(MIDDLE).view(rows, columns // GROUP, GROUP)
    return values.mul_(scales.float().t()[:, :, None]).add_(zeros.float().t()[:, :, None]).view(rows, columns)
