"""The GPU's linear kernels in Triton's interpreter: small shapes, every path, every layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from morph_runtime.kernels.activation import Fp8Rows
from morph_runtime.kernels.cuda.checks import has_scaled_mm
from morph_runtime.kernels.cuda.int4 import TritonInt4Linear
from morph_runtime.kernels.cuda.rows import Fp8Linear, RowsLinear, TritonInt8Linear
from morph_runtime.kernels.cuda.tiles import EDGES, LOCK_ROWS, Tile, pick_fp8, pick_int4, pick_rows
from morph_runtime.kernels.linear import LinearKernel, LinearShape
from morph_runtime.kernels.quantize import (
    dequantize_groups_int4,
    quantize_groups_int4,
    quantize_rows_fp8,
)

BF16 = torch.bfloat16
KINDS: list[type[LinearKernel]] = [Fp8Linear, TritonInt8Linear, TritonInt4Linear]


def weights(n: int, k: int) -> Tensor:
    """bfloat16 [n, k]: rows of different size and offset, one of zeros, one constant."""
    generator = torch.Generator().manual_seed(n + k)
    values = torch.randn(n, k, generator=generator) * 0.05
    values = values * (0.2 + torch.rand(n, 1, generator=generator)) + 0.01 * torch.randn(n, 1, generator=generator)
    values[n // 2], values[n // 3] = 0, 0.25
    return values.to(BF16)


def storage(kernel: LinearKernel, shape: LinearShape) -> dict[str, Tensor]:
    return {f.name: torch.full(f.shape, 7, dtype=torch.float32).to(f.dtype) for f in kernel.fields(shape)}


def packed(kernel: LinearKernel, n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    shape = LinearShape("x", n, k)
    out = storage(kernel, shape)
    kernel.pack(weights(n, k), out)
    return out, torch.empty(max(kernel.scratch_bytes(shape), 1 << 20), dtype=torch.uint8)


def rows(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(BF16)


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape and found.dtype == BF16
    torch.testing.assert_close(found.float(), wanted, atol=0.02 * float(wanted.abs().max()), rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n,k", [(100, 128), (33, 384)])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 16, 17, 37, 65])
def test_run_equals_the_dequantized_product(kind: type[LinearKernel], n: int, k: int, m: int) -> None:
    kernel = kind(BF16)
    out, scratch = packed(kernel, n, k)
    close(kernel.run(rows(m, k), out, scratch), rows(m, k).float() @ kernel.dequantize(out).t())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [64, 128, 200, 300])
def test_many_rows_take_several_tiles(kind: type[LinearKernel], m: int) -> None:
    kernel = kind(BF16)
    out, scratch = packed(kernel, 70, 128)
    close(kernel.run(rows(m, 128), out, scratch), rows(m, 128).float() @ kernel.dequantize(out).t())


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("kind", [Fp8Linear, TritonInt4Linear])
def test_splits_along_k_are_added_and_leave_their_locks_open(
    kind: type[Fp8Linear] | type[TritonInt4Linear], splits: int
) -> None:
    kernel = kind(BF16)
    out, scratch = packed(kernel, 50, 640)
    for bm, bn, mode in ((32, 16, "whole"), (16, 64, "warp"), (32, 32, "halves")):
        found = kernel.run_tile(rows(19, 640), out, scratch, Tile(bm, bn, splits, 4, 2, 128, mode, bn == 64))
        close(found, rows(19, 640).float() @ kernel.dequantize(out).t())
        assert not out["locks"].any()


@pytest.mark.parametrize("m,n,k", [(1, 33, 128), (65, 70, 128), (16, 32, 256)])
def test_fp8_rows_are_multiplied_with_both_scales(m: int, n: int, k: int) -> None:
    kernel = Fp8Linear(BF16)
    out, scratch = packed(kernel, n, k)
    values, scales = quantize_rows_fp8(rows(m, k))
    x = Fp8Rows(values, scales[:, None])
    wanted = (values.float() * scales[:, None]) @ kernel.dequantize(out).t()
    close(kernel.run_fp8_tile(x, out, scratch, Tile(16, 64, 2 if k > 128 else 1, 4, 2)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_activations_are_served_through_scratch(kind: type[LinearKernel]) -> None:
    kernel, shape = kind(torch.float32), LinearShape("x", 40, 256)
    out = storage(kernel, shape)
    kernel.pack(weights(40, 256).float(), out)
    x = torch.randn(3, 256)
    found = kernel.run(x, out, torch.empty(kernel.scratch_bytes(shape), dtype=torch.uint8))
    torch.testing.assert_close(found, x @ kernel.dequantize(out).t(), atol=1e-5, rtol=1e-5)


def test_fp8_codes_and_scales_equal_the_reference() -> None:
    out, _ = packed(Fp8Linear(BF16), 37, 384)
    codes, scales = quantize_rows_fp8(weights(37, 384))
    assert torch.equal(out["codes"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(out["scales"], scales)
    assert not out["locks"].any()


def test_int4_values_equal_the_reference() -> None:
    kernel = TritonInt4Linear(BF16)
    out, _ = packed(kernel, 100, 384)
    codes, scales, zeros = quantize_groups_int4(weights(100, 384), BF16)
    assert torch.equal(kernel.dequantize(out), dequantize_groups_int4(codes, scales, zeros))
    other = storage(kernel, LinearShape("x", 100, 384))
    kernel.pack_codes(codes, scales, zeros, other)
    assert all(torch.equal(out[name], other[name]) for name in out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [64, 128])
def test_packing_in_chunks_gives_the_same_bytes(kind: type[LinearKernel], step: int) -> None:
    kernel, weight = kind(BF16), weights(200, 256)
    whole, _ = packed(kernel, 200, 256)
    parts = storage(kernel, LinearShape("x", 200, 256))
    for first in range(0, 200, step):
        kernel.pack(weight[first : first + step], parts, first)
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), parts[name].view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_arguments_are_refused(kind: type[RowsLinear]) -> None:
    kernel = kind(BF16)
    out, scratch = packed(kernel, 64, 256)
    for x in (rows(2, 128), rows(2, 256).float(), rows(2, 512)[:, ::2]):
        with pytest.raises(ValueError, match="x must be contiguous"):
            kernel.run(x, out, scratch)
    with pytest.raises(ValueError, match="do not fit"):
        kernel.pack(weights(64, 256), out, 64)
    with pytest.raises(ValueError, match="scratch"):
        kernel.run_tile(rows(2, 256), out, scratch[:64], Tile(16, 64, 2, 4, 2))


@given(m=st.integers(1, 3000), n=st.integers(1, 50000), groups=st.integers(1, 200), table=st.sampled_from([0, 1, 2]))
def test_every_tile_finds_its_locks_its_scratch_and_enough_of_k(m: int, n: int, groups: int, table: int) -> None:
    pick, k = (pick_int4, pick_rows, pick_fp8)[table], 128 * groups
    tile = pick(m, n, k)
    tiles_m, tiles_n, splits = tile.grid(m, n)
    assert splits == 1 or (splits * 2 <= groups and tiles_m * tiles_n <= -(-n // LOCK_ROWS))
    assert tile.partial_bytes(m, n) <= max(pick(edge, n, k).partial_bytes(edge, n) for edge in EDGES)


def test_fp8_rows_are_wanted_beside_bfloat16_alone() -> None:
    assert Fp8Linear(BF16).wants_fp8(1) and not Fp8Linear(torch.float32).wants_fp8(1)
    assert not TritonInt4Linear(BF16).wants_fp8(512)
    with pytest.raises(ValueError, match="takes no FP8 rows"):
        TritonInt4Linear(BF16).run_fp8(Fp8Rows(torch.zeros(1), torch.zeros(1)), {}, torch.zeros(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cpu_is_refused(kind: type[LinearKernel]) -> None:
    assert kind.can_implement(LinearShape("x", 64, 128), BF16, torch.device("cpu")) == (
        False,
        "it runs on cuda, not on cpu",
    )


@pytest.mark.parametrize(("major", "there"), [(8, True), (9, True), (10, True), (11, False), (12, False)])
def test_row_scales_are_left_to_pytorch_only_where_it_has_them(
    monkeypatch: pytest.MonkeyPatch, major: int, there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, 0))
    assert has_scaled_mm.__wrapped__(torch.device("cuda", 0)) is there
    assert has_scaled_mm.__wrapped__(torch.device("cpu"))
