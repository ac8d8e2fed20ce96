"""Products x W^T of full-precision or FP8 rows with packed weights.

Every kernel computes tiles of the transposed product W x^T: the weights are the tensor cores' left operand, so
that their conversion to bfloat16 never leaves the registers. `splits` programs may share a tile along K. Each then
writes its float32 sum to `partial`, and the last one to arrive adds them all in the order of K: results do not
depend on which one that is. `locks` counts the arrivals of each tile; it is zero before and after.

Both formats pack what one step along K needs next to each other:
FP8 and int8: codes [N, K] as they are, with one float32 scale per row.
W4: see `packing`.
"""

from __future__ import annotations

import triton.language as tl

from morph_runtime.kernels.cuda.jit import kernel, kernel_with_varying

E4M3_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b, s, t, bias, zero;
mov.b32 bias, 0x7b807b80;
mov.b32 zero, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
and.b32 s, a, 0x80008000;
shr.u32 t, a, 4;
lop3.b32 a, t, 0x07f007f0, s, 0xea;
and.b32 s, b, 0x80008000;
shr.u32 t, b, 4;
lop3.b32 b, t, 0x07f007f0, s, 0xea;
fma.rn.bf16x2 $0, a, bias, zero;
fma.rn.bf16x2 $1, b, bias, zero;
}""")
"""Four e4m3 bytes to four bfloat16: the bits move into place, 2^120 corrects the exponent's bias; exact."""

NIBBLES_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b, c, d, h, one, less;
mov.b32 one, 0x3f803f80;
mov.b32 less, 0xc308c308;
prmt.b32 h, $4, 0, 0x4140;
lop3.b32 a, h, 0x000f000f, 0x43004300, 0xea;
shr.u32 h, h, 4;
lop3.b32 c, h, 0x000f000f, 0x43004300, 0xea;
prmt.b32 h, $4, 0, 0x4342;
lop3.b32 b, h, 0x000f000f, 0x43004300, 0xea;
shr.u32 h, h, 4;
lop3.b32 d, h, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 a, a, one, less;
fma.rn.bf16x2 b, b, one, less;
fma.rn.bf16x2 c, c, one, less;
fma.rn.bf16x2 d, d, one, less;
fma.rn.bf16x2 $0, a, $5, $9;
fma.rn.bf16x2 $1, b, $7, $11;
fma.rn.bf16x2 $2, c, $5, $9;
fma.rn.bf16x2 $3, d, $7, $11;
}""")
"""Four bytes of W4 codes to (code - 8) * scale + zero. A code in the low bits of 0x4300 is 128 + code, exactly;
less 136 it is code - 8, exactly; the last step rounds once. Two neighbours belong to one row, four may not."""


@kernel
def widen_e4m3(codes: tl.tensor, packed_math: tl.constexpr) -> tl.tensor:
    """uint8 tile of e4m3 codes -> bfloat16, exact."""
    if packed_math:
        wide = tl.inline_asm_elementwise(E4M3_TO_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        wide = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(tl.bfloat16)
    return wide


@kernel
def widen_int4(codes: tl.tensor, both: tl.tensor, packed_math: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """uint8 [n, 64] -> bfloat16 [n, 64] of the low halves and of the high ones; both int32 [n]: zero << 16 | scale."""
    if packed_math:
        scale = ((both & 0xFFFF) * 0x10001)[:, None]
        zero = (((both >> 16) & 0xFFFF) * 0x10001)[:, None]
        codes, scale, zero = tl.broadcast(codes, scale)[0], tl.broadcast(codes, scale)[1], tl.broadcast(codes, zero)[1]
        low, high = tl.inline_asm_elementwise(
            NIBBLES_TO_BF16,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [codes, scale, zero],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        scale = (both << 16).to(tl.float32, bitcast=True)[:, None]
        zero = (both & -65536).to(tl.float32, bitcast=True)[:, None]
        low = (((codes & 15).to(tl.float32) - 8) * scale + zero).to(tl.bfloat16)
        high = (((codes >> 4).to(tl.float32) - 8) * scale + zero).to(tl.bfloat16)
    return low, high


@kernel
def from_lanes(values: tl.tensor, rows: tl.constexpr, columns: tl.constexpr) -> tl.tensor:
    """[rows, columns] in an order where each of four lanes holds 16 contiguous bytes of every 64 -> in plain order.

    In the tensor cores' left operand lane q of four holds columns 2q, 2q + 1, 2q + 8 and 2q + 9 of every 16. With
    those next to each other in memory a lane reads them with one wide load and nothing is shuffled.
    """
    return values.reshape(rows, columns // 64, 4, 4, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(rows, columns)


@kernel
def lane_order(columns: tl.constexpr) -> tl.tensor:
    """int32 [columns]: where `from_lanes` takes each column from."""
    c = tl.arange(0, columns)
    inner = ((c >> 1) & 3) * 16 + ((c >> 4) & 3) * 4 + ((c >> 3) & 1) * 2 + (c & 1)
    return tl.max_contiguous(tl.multiple_of((c & ~63) + inner, 2), 2)


@kernel
def add_product(w: tl.tensor, rows: tl.tensor, acc: tl.tensor, packed_math: tl.constexpr) -> tl.tensor:
    """acc + w rows^T; w [bn, bk], rows [bm, bk]. In float32 without packed_math: the interpreter knows no bfloat16."""
    if packed_math:
        acc = tl.dot(w, tl.trans(rows), acc)
    else:
        acc = tl.dot(w.to(tl.float32), tl.trans(rows.to(tl.float32)), acc, input_precision="ieee")
    return acc


@kernel
def detached(acc: tl.tensor, packed_math: tl.constexpr) -> tl.tensor:
    """acc, hidden from the compiler for a moment.

    A sum that a loop carries straight into its next product makes the compiler cut that product into slices with a
    wait after each, and ptxas then runs them one by one (its remark C7515). An empty step in between prevents that.
    """
    if packed_math:
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@kernel
def finish(
    acc: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    locks: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    offs_n: tl.tensor,
    offs_m: tl.tensor,
    tile: tl.tensor,
    tiles: tl.tensor,
    split: tl.tensor,
    splits: tl.tensor,
    split_k: tl.constexpr,
    bn: tl.constexpr,
    bm: tl.constexpr,
) -> None:
    """Store a tile acc float32 [bn, bm] into y [columns, rows], or share it with the other splits first."""
    y_ptrs = y + offs_m[None, :] * rows + offs_n[:, None]
    inside = (offs_m[None, :] < columns) & (offs_n[:, None] < rows)
    if split_k:
        size: tl.constexpr = bn * bm
        place = tl.arange(0, bn)[:, None] * bm + tl.arange(0, bm)[None, :]
        own = partial + (split * tiles + tile) * size + place
        tl.store(own, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(locks + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            total = tl.zeros((bn, bm), tl.float32)
            for other in range(splits):
                total += tl.load(partial + (other * tiles + tile) * size + place, cache_modifier=".cg")
            tl.store(y_ptrs, total.to(y.dtype.element_ty), mask=inside)
            tl.store(locks + tile, 0)
    else:
        tl.store(y_ptrs, acc.to(y.dtype.element_ty), mask=inside)


@kernel_with_varying(["m", "splits"])
def rows_product(
    x: tl.tensor,
    x_scales: tl.tensor,
    w: tl.tensor,
    w_scales: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    locks: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    splits: tl.tensor,
    bm: tl.constexpr,
    bn: tl.constexpr,
    bk: tl.constexpr,
    split_k: tl.constexpr,
    kind: tl.constexpr,
    wide: tl.constexpr,
    packed_math: tl.constexpr,
) -> None:
    """y [m, n] = x [m, k] w^T [n, k] * w_scales [n], k a multiple of bk.

    kind "fp8": w uint8 e4m3 codes, x bfloat16. "fp8x8": w and x e4m3, the result times x_scales [m]. "int8": w int8.
    wide: read the codes in `from_lanes`' order, which the rows of x then follow: for few rows.
    """
    tile_m, tile_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = tile_n * bn + tl.arange(0, bn)
    offs_m = tile_m * bm + tl.arange(0, bm)
    offs_k = tl.arange(0, bk)
    x_order = lane_order(bk) if wide else offs_k
    steps = k // bk
    first, last = split * steps // splits, (split + 1) * steps // splits
    w_ptrs = w + tl.minimum(offs_n, n - 1)[:, None] * k + offs_k[None, :] + first * bk
    x_ptrs = x + tl.minimum(offs_m, m - 1)[:, None] * k + x_order[None, :] + first * bk
    acc = tl.zeros((bn, bm), tl.float32)
    for _ in range(first, last):
        codes = tl.load(w_ptrs)
        rows = tl.load(x_ptrs)
        if wide:
            codes = from_lanes(codes, bn, bk)
        if kind == "fp8":
            acc = add_product(widen_e4m3(codes, packed_math), rows, detached(acc, packed_math), packed_math)
        elif kind == "int8":
            acc = add_product(codes.to(tl.float32).to(tl.bfloat16), rows, acc, packed_math)
        else:
            acc = add_product(codes, rows, acc, packed_math)
        w_ptrs += bk
        x_ptrs += bk
    acc *= tl.load(w_scales + tl.minimum(offs_n, n - 1))[:, None]
    if kind == "fp8x8":
        acc *= tl.load(x_scales + tl.minimum(offs_m, m - 1))[None, :]
    tiles = tl.num_programs(0) * tl.num_programs(1)
    tile = tile_n * tl.num_programs(0) + tile_m
    finish(acc, y, partial, locks, n, m, offs_n, offs_m, tile, tiles, split, splits, split_k, bn, bm)


@kernel_with_varying(["m", "splits"])
def int4_product(
    x: tl.tensor,
    codes: tl.tensor,
    both: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    locks: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    splits: tl.tensor,
    bm: tl.constexpr,
    bn: tl.constexpr,
    split_k: tl.constexpr,
    mode: tl.constexpr,
    packed_math: tl.constexpr,
) -> None:
    """y [m, n] = x [m, k] w^T; w as `packing.pack_int4` writes it: codes uint8, both int32.

    mode "whole": one product per group. "halves": two, of half the registers. "warp": for tiles so small that the
    compiler takes the older tensor core instruction, whose lanes hold columns 8q .. 8q + 7 of every 32: codes stay
    where they are and x is read in their order.
    """
    tile_m, tile_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = tile_n * bn + tl.arange(0, bn)
    offs_m = tile_m * bm + tl.arange(0, bm)
    offs_k = tl.arange(0, 64 if mode == "halves" else 128)
    groups = k // 128
    first, last = split * groups // splits, (split + 1) * groups // splits
    stored = tl.minimum(offs_n, (n + 63) // 64 * 64 - 1)
    block = stored // 64 * groups + first
    code_ptrs = codes + (block * 64 + stored % 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    both_ptrs = both + first * n + tl.minimum(offs_n, n - 1)
    x_ptrs = x + tl.minimum(offs_m, m - 1)[:, None] * k + first * 128 + offs_k[None, :]
    acc = tl.zeros((bn, bm), tl.float32)
    for _ in range(first, last):
        packed = tl.load(code_ptrs)
        if mode == "warp":
            packed = packed.reshape(bn, 4, 2, 8).permute(0, 2, 1, 3).reshape(bn, 64)
        else:
            packed = from_lanes(packed, bn, 64)
        low, high = widen_int4(packed, tl.load(both_ptrs), packed_math)
        if mode == "halves":
            acc = add_product(low, tl.load(x_ptrs), detached(acc, packed_math), packed_math)
            acc = add_product(high, tl.load(x_ptrs + 64), detached(acc, packed_math), packed_math)
        else:
            rows = tl.load(x_ptrs)
            if mode == "warp":
                rows = rows.reshape(bm, 4, 2, 2, 4, 2).permute(0, 1, 4, 2, 3, 5).reshape(bm, 128)
            else:
                acc = detached(acc, packed_math)
            wide = tl.join(low, high).permute(0, 2, 1).reshape(bn, 128)
            acc = add_product(wide, rows, acc, packed_math)
        code_ptrs += 4096
        both_ptrs += n
        x_ptrs += 128
    tiles = tl.num_programs(0) * tl.num_programs(1)
    tile = tile_n * tl.num_programs(0) + tile_m
    finish(acc, y, partial, locks, n, m, offs_n, offs_m, tile, tiles, split, splits, split_k, bn, bm)
