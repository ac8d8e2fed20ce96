"""Row-wise steps of a decoder layer, each one kernel: residual add and norm, activation, quantization to FP8 rows.

Sums are float32; values are rounded to their type where the CPU path (kernels.pointwise) rounds them. An FP8 output
is the rounded value quantized, so that a layer that wants FP8 sees what `quantize_rows` of the other output gives.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from morph_runtime.kernels.activation import Fp8Rows
from morph_runtime.kernels.cuda.jit import follow, kernel, overlap_options, overlaps, power_of_two

FP8 = torch.float8_e4m3fn
FEW_ROWS = 32
"""So few rows leave processors idle: more warps each are faster (activation in FP8, 1 row: 3.0 against 3.6 µs)."""
SWIGLU_TILE = 1024
"""Values per program of the activation without FP8."""


@kernel
def _store_fp8(
    x: tl.tensor, values: tl.tensor, scales: tl.tensor, row: tl.tensor, columns: tl.tensor, width: tl.tensor
) -> None:
    """Quantize a row held in float32, 0 beyond its width."""
    largest = tl.max(tl.abs(x), 0)
    scale = tl.where(largest > 0.0, largest / 448.0, 1.0)
    quantized = tl.minimum(tl.maximum(x * (1.0 / scale), -448.0), 448.0)
    tl.store(values + row * width + columns, quantized.to(values.dtype.element_ty), mask=columns < width)
    tl.store(scales + row, scale)


@kernel
def _add_norm(
    hidden: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    hidden_stride: tl.tensor,
    delta_stride: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        follow()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = hidden + row * hidden_stride + columns
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta + row * delta_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(hidden.dtype.element_ty)
        tl.store(place, rounded, mask=inside)
        x = rounded.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    x = x.to(hidden.dtype.element_ty).to(tl.float32)
    x *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if QUANTIZE:
        x = x.to(hidden.dtype.element_ty).to(tl.float32)
        _store_fp8(x, out, scales, row, columns, width)
    else:
        tl.store(out + row * width + columns, x.to(out.dtype.element_ty), mask=inside)


@kernel
def _gated(gate_up: tl.tensor, place: tl.tensor, width: tl.tensor, inside: tl.tensor) -> tl.tensor:
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + width, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(gate_up.dtype.element_ty).to(tl.float32)
    return (activated * up).to(gate_up.dtype.element_ty)


@kernel
def _swiglu(
    gate_up: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        follow()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    tl.store(out + row * width + columns, _gated(gate_up, row * stride + columns, width, inside), mask=inside)


@kernel
def _swiglu_fp8(
    gate_up: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        follow()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = _gated(gate_up, row * stride + columns, width, columns < width).to(tl.float32)
    _store_fp8(x, out, scales, row, columns, width)


@kernel
def _quantize_rows(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        follow()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + columns, mask=columns < width, other=0.0).to(tl.float32)
    _store_fp8(values, out, scales, row, columns, width)


def _warps(block: int, rows: int) -> int:
    """Warps of a program that holds a row: 16 values a thread, 4 to 16 warps; with few rows, up to 32."""
    return min(max(block // 512, 4), 32 if rows <= FEW_ROWS else 16)


def _check_rows(name: str, x: Tensor) -> tuple[int, int]:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"{name} is {tuple(x.shape)} with strides {x.stride()}: rows must be contiguous, [M, K].")
    return x.shape[0], x.shape[1]


def _fp8_rows(rows: int, width: int, device: torch.device) -> Fp8Rows:
    values = torch.empty(rows, width, dtype=FP8, device=device)
    return Fp8Rows(values, torch.empty(rows, 1, dtype=torch.float32, device=device))


def add_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, fp8: bool = False) -> Tensor | Fp8Rows:
    """Add to the residual stream in place, then take its RMSNorm.

    Args:
        hidden: [M, K], rows contiguous; `hidden += delta`.
        delta: [M, K], rows contiguous; None: nothing to add.
        weight: [K].
        eps: added to the mean square.
        fp8: return FP8 rows.

    Returns:
        The norm, [M, K] of hidden's type, or Fp8Rows.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, width = _check_rows("hidden", hidden)
    if delta is not None and _check_rows("delta", delta) != (rows, width):
        raise ValueError(f"delta is {tuple(delta.shape)}, hidden {(rows, width)}: they must be of one shape.")
    if weight.shape != (width,):
        raise ValueError(f"The norm has {tuple(weight.shape)} weights, hidden {width} columns: they must agree.")
    overlap = overlaps(hidden.device)
    added = hidden if delta is None else delta
    block = power_of_two(width)
    out = (
        _fp8_rows(rows, width, hidden.device)
        if fp8
        else torch.empty_like(hidden, memory_format=torch.contiguous_format)
    )
    values, scales = out if isinstance(out, Fp8Rows) else (out, weight)
    _add_norm[(rows,)](
        hidden,
        added,
        weight,
        values,
        scales,
        hidden.stride(0),
        added.stride(0),
        width,
        eps,
        delta is not None,
        fp8,
        block,
        overlap,
        num_warps=_warps(block, rows),
        **overlap_options(overlap),
    )
    return out


def swiglu(gate_up: Tensor, fp8: bool = False) -> Tensor | Fp8Rows:
    """silu(gate) * up.

    Args:
        gate_up: [M, 2 * ffn], gate first, rows contiguous.
        fp8: return FP8 rows.

    Returns:
        [M, ffn] of the same type, contiguous, or Fp8Rows.

    Raises:
        ValueError: the shape does not fit.
    """
    rows, both = _check_rows("gate_up", gate_up)
    width = both // 2
    overlap = overlaps(gate_up.device)
    if both % 2:
        raise ValueError(f"gate_up has {both} columns: it needs two halves.")
    if fp8:
        quantized = _fp8_rows(rows, width, gate_up.device)
        block = power_of_two(width)
        _swiglu_fp8[(rows,)](
            gate_up,
            *quantized,
            gate_up.stride(0),
            width,
            block,
            overlap,
            num_warps=_warps(block, rows),
            **overlap_options(overlap),
        )
        return quantized
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(SWIGLU_TILE, power_of_two(width))
    _swiglu[(rows, -(-width // block))](
        gate_up, out, gate_up.stride(0), width, block, overlap, num_warps=4, **overlap_options(overlap)
    )
    return out


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Quantize each row to FP8 with a scale of its own; x [M, K], rows contiguous.

    Raises:
        ValueError: the rows are not contiguous.
    """
    rows, width = _check_rows("x", x)
    overlap = overlaps(x.device)
    out = _fp8_rows(rows, width, x.device)
    block = power_of_two(width)
    _quantize_rows[(rows,)](
        x, *out, x.stride(0), width, block, overlap, num_warps=_warps(block, rows), **overlap_options(overlap)
    )
    return out
