"""Full-precision rows into the quantized layouts, and W4 back: one launch each, nothing allocated.

The values are those of `kernels.quantize`, bit for bit: every operation below is the correctly rounded one that
PyTorch uses on a CPU, and none may be fused or replaced by a reciprocal.

W4's layout: blocks of 64 rows x one group of 128 inputs. `codes` uint8 [ceil(N / 64), K / 128, 64, 64]: a byte
holds the code of input j in its low half and that of input j + 64 in its high half. The 64 bytes of a row stand in
the order that `products.from_lanes` undoes: j = 16 i + 8 h + 2 q + e is byte 16 q + 4 i + 2 h + e.
`both` int32 [K / 128, N]: zero << 16 | scale, as bfloat16 bits. Rows of `codes` past N are never written.
"""

from __future__ import annotations

import triton.language as tl

from morph_runtime.kernels.cuda.jit import kernel, kernel_with_varying
from morph_runtime.kernels.cuda.products import from_lanes

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a small float32 to the nearest integer, ties to even."""


@kernel
def round_to_bf16(values: tl.tensor) -> tl.tensor:
    """float32 -> the nearest bfloat16 values, ties to even, as float32; the interpreter's own cast truncates."""
    bits = values.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@kernel
def as_bits(values: tl.tensor) -> tl.tensor:
    """float32 holding bfloat16 values -> their bfloat16 bits, int32."""
    return (values.to(tl.int32, bitcast=True) >> 16) & 0xFFFF


@kernel
def round_to_e4m3(values: tl.tensor) -> tl.tensor:
    """float32 in -448..448 -> the nearest e4m3 values, ties to even, as float32; for the interpreter."""
    size = tl.abs(values)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 121)
    ulp = ((exponent + 20) << 23).to(tl.float32, bitcast=True)
    size = (size + ulp) - ulp
    return tl.where(values < 0, -size, size)


@kernel
def divided(values: tl.tensor, scale: tl.tensor, inverse: tl.tensor, native: tl.constexpr) -> tl.tensor:
    """values / scale, correctly rounded; inverse is 1 / scale, correctly rounded.

    One Newton step with fused multiply-add (P. Markstein, IBM J. Res. Dev. 34(1), 1990): exact where nothing leaves
    the range of float32, and several times cheaper than a division. The interpreter does not fuse, so it divides.
    """
    if native:
        guess = values * inverse
        ratio = tl.fma(tl.fma(-guess, scale, values), inverse, guess)
    else:
        ratio = tl.div_rn(values, scale + tl.zeros_like(values))
    return ratio


@kernel
def nearest_code(
    values: tl.tensor, zero: tl.tensor, scale: tl.tensor, inverse: tl.tensor, native: tl.constexpr
) -> tl.tensor:
    """float32 [r, 64] -> uint8 codes in 0..15."""
    steps = divided(values - zero, scale, inverse, native) + 8
    steps = tl.minimum(tl.maximum(steps, 0.0), 15.0)
    # The sum's lowest bits are the integer: no conversion, of which a GPU makes few at a time.
    return ((steps + ROUND).to(tl.int32, bitcast=True) & 15).to(tl.uint8)


@kernel
def to_lanes(values: tl.tensor, rows: tl.constexpr) -> tl.tensor:
    """[rows, 64] in plain order -> in the order of storage, the inverse of `products.from_lanes`."""
    return values.reshape(rows, 4, 2, 4, 2).permute(0, 3, 1, 2, 4).reshape(rows, 64)


@kernel_with_varying(["first_row", "count"])
def pack_int4(
    weight: tl.tensor,
    codes: tl.tensor,
    both: tl.tensor,
    locks: tl.tensor,
    first_row: tl.tensor,
    count: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    tiny: tl.tensor,
    rows: tl.constexpr,
    native: tl.constexpr,
) -> None:
    """Quantize rows [count, k] and store them from `first_row` of [n, k]; one group per program."""
    group = tl.program_id(0)
    row = tl.program_id(1) * rows + tl.arange(0, rows)
    inside = row < count
    column = group * 128 + tl.arange(0, 64)
    place = row.to(tl.int64)[:, None] * k + column[None, :]
    low = tl.load(weight + place, mask=inside[:, None], other=0).to(tl.float32)
    high = tl.load(weight + place + 64, mask=inside[:, None], other=0).to(tl.float32)
    least = tl.min(tl.minimum(low, high), 1)
    span = tl.max(tl.maximum(low, high), 1) - least
    scale = tl.div_rn(span, tl.full((rows,), 15.0, tl.float32))
    varied = scale > tiny
    scale = round_to_bf16(tl.where(varied, scale, 1.0))
    zero = round_to_bf16(tl.where(varied, least + 8 * scale, least))
    inverse = tl.div_rn(tl.full((rows,), 1.0, tl.float32), scale)[:, None]
    low_codes = nearest_code(low, zero[:, None], scale[:, None], inverse, native)
    packed = low_codes | nearest_code(high, zero[:, None], scale[:, None], inverse, native) << 4
    target = first_row + row
    slot = ((target // 64).to(tl.int64) * (k // 128) + group) * 64 + target % 64
    tl.store(codes + slot[:, None] * 64 + tl.arange(0, 64)[None, :], to_lanes(packed, rows), mask=inside[:, None])
    tl.store(both + group * n + target, as_bits(zero) << 16 | as_bits(scale), mask=inside)
    if group == 0:
        tl.store(locks + target // 16, tl.zeros((rows,), tl.int32), mask=inside & (target % 16 == 0))


@kernel_with_varying(["first_row", "last_row"])
def unpack_int4(
    codes: tl.tensor,
    both: tl.tensor,
    weight: tl.tensor,
    first_row: tl.tensor,
    last_row: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    rows: tl.constexpr,
) -> None:
    """The weights (code - 8) * scale + zero of [n, k] from `first_row` to before `last_row`; one group per program.

    Rounded once to the type of `weight`, which begins with that row.
    """
    group = tl.program_id(0)
    part = tl.program_id(1) * rows + tl.arange(0, rows)
    row = first_row + part
    inside = row < last_row
    slot = ((row // 64).to(tl.int64) * (k // 128) + group) * 64 + row % 64
    packed = tl.load(codes + slot[:, None] * 64 + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0)
    packed = from_lanes(packed, rows, 64)
    pair = tl.load(both + group * n + row, mask=inside, other=0)
    scale = (pair << 16).to(tl.float32, bitcast=True)[:, None]
    zero = (pair & -65536).to(tl.float32, bitcast=True)[:, None]
    place = part.to(tl.int64)[:, None] * k + group * 128 + tl.arange(0, 64)[None, :]
    low = ((packed & 15).to(tl.float32) - 8) * scale + zero
    high = ((packed >> 4).to(tl.float32) - 8) * scale + zero
    tl.store(weight + place, low.to(weight.dtype.element_ty), mask=inside[:, None])
    tl.store(weight + place + 64, high.to(weight.dtype.element_ty), mask=inside[:, None])


@kernel_with_varying(["first_row"])
def pack_rows(
    weight: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    locks: tl.tensor,
    first_row: tl.tensor,
    k: tl.tensor,
    top: tl.tensor,
    block: tl.constexpr,
    fp8: tl.constexpr,
    native: tl.constexpr,
) -> None:
    """Quantize rows [n, k] to FP8 (top 448) or int8 (top 127) and store them from `first_row`; one row per program.

    native: the hardware's conversion to FP8 can be used.
    """
    row = tl.program_id(0).to(tl.int64)
    target = first_row + row
    column = tl.arange(0, block)
    inside = column < k
    values = tl.load(weight + row * k + column, mask=inside, other=0).to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    scale = tl.div_rn(largest, top)
    scale = tl.where(scale > 0, scale, 1.0)
    if largest > 1e-30:
        ratio = divided(values, scale, tl.div_rn(1.0, scale), native)
    else:
        ratio = tl.div_rn(values, tl.zeros((block,), tl.float32) + scale)
    ratio = tl.minimum(tl.maximum(ratio, -top), top)
    if fp8:
        if not native:
            ratio = round_to_e4m3(ratio)
        tl.store(codes + target * k + column, ratio.to(tl.float8e4nv), mask=inside)
    else:
        tl.store(codes + target * k + column, ((ratio + ROUND) - ROUND).to(tl.int8), mask=inside)
    tl.store(scales + target, scale)
    if target % 16 == 0:
        tl.store(locks + target // 16, 0)
