"""The linear kernels on a GPU: real shapes, odd shapes, and nothing written beside the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from morph_runtime.kernels.activation import Fp8Rows
from morph_runtime.kernels.linear import GroupedInt4Kernel, LinearKernel, LinearShape
from morph_runtime.kernels.quantize import (
    dequantize_groups_int4,
    quantize_groups_int4,
    quantize_rows_fp8,
)
from morph_runtime.kernels.registry import select
from morph_runtime.kernels.rung import Rung

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""||found - wanted|| / ||wanted|| against float64 with the same weights and the same (FP8) rows."""
FP8_TOLERANCE = 6e-3
"""Products of FP8 by FP8: Hopper's tensor cores keep about 14 bits of their sums (seen: 4.1e-3 over 22016 terms)."""
REAL = [(6144, 4096), (4096, 14336), (22016, 4096), (4096, 11008), (10240, 8192), (8192, 22016)]
ODD = [(33, 128), (100, 384), (1000, 4096), (4097, 640)]
ROWS = [1, 2, 3, 5, 16, 17, 37, 64, 65, 128, 200, 513]
FORCED: list[tuple[Rung, str]] = [("full", ""), ("w8", "fp8"), ("w8", "int8-triton"), ("w4", "")]


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor between two stretches of NaN bytes, and all of it."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    around = torch.full((size + 8192 + 256 - size % 256,), 0xFF, dtype=torch.uint8, device=CUDA)
    return around[4096 : 4096 + size].view(dtype).view(shape), around


def weights(n: int, k: int, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(n + k)
    values = torch.randn(n, k, generator=generator, device=CUDA) * 0.05
    values[n // 2], values[n // 3] = 0, 0.25
    return values.to(dtype)


def make(rung: Rung, forced: str, n: int, k: int, dtype: torch.dtype) -> tuple[LinearKernel, dict[str, Tensor], Tensor]:
    shape = LinearShape("x", n, k)
    kernel = select(rung, shape, dtype, CUDA, forced)
    out = {f.name: guarded(f.shape, f.dtype)[0] for f in kernel.fields(shape)}
    kernel.pack(weights(n, k, dtype), out)
    return kernel, out, torch.full((kernel.scratch_bytes(shape),), 0xFF, dtype=torch.uint8, device=CUDA)


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("rung,forced", FORCED)
@pytest.mark.parametrize("n,k", REAL + ODD)
def test_run_equals_the_dequantized_product(rung: Rung, forced: str, n: int, k: int) -> None:
    kernel, out, scratch = make(rung, forced, n, k, BF16)
    values = kernel.dequantize(out).double()
    for m in ROWS:
        x, _ = guarded((m, k), BF16)
        x.copy_(torch.randn(m, k, device=CUDA))
        wanted = x.double() @ values.t()
        found = kernel.run(x, out, scratch)
        assert error(found, wanted) < TOLERANCE[BF16], m
        assert torch.equal(found, kernel.run(x, out, scratch)), "the same bytes every time"
        if kernel.name == "fp8":
            codes, scales = quantize_rows_fp8(x)
            wanted = (codes.double() * scales.double()[:, None]) @ values.t()
            found = kernel.run_fp8(Fp8Rows(codes, scales[:, None].contiguous()), out, scratch)
            assert error(found, wanted) < FP8_TOLERANCE, m
        if "locks" in out:
            assert not out["locks"].any()


@pytest.mark.parametrize("rung,forced", FORCED)
def test_float32_is_served(rung: Rung, forced: str) -> None:
    kernel, out, scratch = make(rung, forced, 100, 384, torch.float32)
    x = torch.randn(5, 384, device=CUDA)
    assert error(kernel.run(x, out, scratch), x.double() @ kernel.dequantize(out).double().t()) < 1e-5


@pytest.mark.parametrize("n,k", [(1000, 4096), (300, 14336), (200, 22016), (33, 128)])
def test_packing_gives_the_bytes_of_the_reference(n: int, k: int) -> None:
    """The reference runs on the CPU."""
    weight = weights(n, k)
    kernel, out, _ = make("w8", "fp8", n, k, BF16)
    codes, scales = quantize_rows_fp8(weight.cpu())
    assert torch.equal(out["codes"].cpu().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(out["scales"].cpu(), scales)
    kernel, out, _ = make("w4", "", n, k, BF16)
    assert isinstance(kernel, GroupedInt4Kernel)
    reference = quantize_groups_int4(weight.cpu(), BF16)
    assert torch.equal(kernel.dequantize(out).cpu(), dequantize_groups_int4(*reference))
    other = {name: tensor.clone() for name, tensor in out.items()}
    kernel.pack_codes(*(part.to(CUDA) for part in reference), other)
    for name, tensor in out.items():
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("rung,forced", FORCED[1:])
def test_packing_writes_its_rows_alone(rung: Rung, forced: str) -> None:
    shape = LinearShape("x", 100, 256)
    kernel = select(rung, shape, BF16, CUDA, forced)
    pairs = {f.name: guarded(f.shape, f.dtype) for f in kernel.fields(shape)}
    kernel.pack(weights(100, 256)[:64].contiguous(), {name: pair[0] for name, pair in pairs.items()})
    for own, around in pairs.values():
        size = own.nbytes
        assert (around[:4096] == 0xFF).all() and (around[4096 + size :] == 0xFF).all()
    codes = pairs["codes"][0].view(torch.uint8)
    assert (codes[64:] if rung == "w8" else codes[1]).eq(0xFF).all()


@pytest.mark.parametrize("rung,forced", FORCED)
def test_a_graph_gives_what_a_plain_call_gives(rung: Rung, forced: str) -> None:
    kernel, out, scratch = make(rung, forced, 1024, 2048, BF16)
    x = torch.randn(17, 2048, device=CUDA, dtype=BF16)
    wanted = kernel.run(x, out, scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel.run(x, out, scratch)
    for _ in range(3):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, wanted)
