from __future__ import annotations

import pytest
import torch
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.kernels import int4_cpu, int8_cpu
from morph_runtime.kernels.full_torch import TorchLinear
from morph_runtime.kernels.int4_cpu import AtenInt4Linear, NibbleLinear, probe_int4pack_layout
from morph_runtime.kernels.int8_cpu import AtenInt8Linear, Int8Linear
from morph_runtime.kernels.linear import LinearKernel, LinearShape
from morph_runtime.kernels.registry import KERNELS, select

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 2e-2)}
"""(atol, rtol) against float32 with the same weights, relative to the largest output."""
CASES = [
    (TorchLinear, torch.float32),
    (TorchLinear, torch.bfloat16),
    (Int8Linear, torch.float32),
    (Int8Linear, torch.bfloat16),
    (AtenInt8Linear, torch.bfloat16),
    (NibbleLinear, torch.float32),
    (NibbleLinear, torch.bfloat16),
    (AtenInt4Linear, torch.bfloat16),
]


def weights(n: int, k: int, seed: int = 0) -> Tensor:
    """float32 [n, k], rows of different size and offset, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator) * 0.05
    return values * (0.2 + torch.rand(n, 1, generator=generator)) + 0.01 * torch.randn(n, 1, generator=generator)


def storage(kernel: LinearKernel, shape: LinearShape) -> dict[str, Tensor]:
    return {f.name: torch.full(f.shape, 1, dtype=f.dtype) for f in kernel.fields(shape)}


def scratch(kernel: LinearKernel, shape: LinearShape) -> Tensor:
    return torch.empty(kernel.scratch_bytes(shape), dtype=torch.uint8)


@pytest.mark.parametrize("kind,dtype", CASES)
@pytest.mark.parametrize("n,k", [(64, 128), (192, 384), (96, 256), (100, 128)])
def test_run_equals_the_dequantized_product(kind: type[LinearKernel], dtype: torch.dtype, n: int, k: int) -> None:
    shape = LinearShape("x", n, k)
    fits, reason = kind.can_implement(shape, dtype, CPU)
    if not fits:
        assert (kind is AtenInt4Linear and "multiple of its block" in reason) or "int4" in reason
        return
    kernel = kind(dtype)
    weight = weights(n, k).to(dtype)
    packed = storage(kernel, shape)
    kernel.pack(weight, packed)
    values = kernel.dequantize(packed)
    assert values.shape == (n, k) and values.dtype == torch.float32
    atol, rtol = TOLERANCE[dtype]
    for m in (1, 3, 8, 9, 17, 57, 130):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        wanted = x.float() @ values.t()
        found = kernel.run(x, packed, scratch(kernel, shape))
        assert found.shape == (m, n) and found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted, atol=atol * float(wanted.abs().max()), rtol=rtol)


@pytest.mark.parametrize("kind,dtype", CASES)
def test_quantization_error_is_at_most_half_a_step(kind: type[LinearKernel], dtype: torch.dtype) -> None:
    shape = LinearShape("x", 64, 256)
    if not kind.can_implement(shape, dtype, CPU)[0]:
        pytest.skip("not on this CPU")
    kernel, weight = kind(dtype), weights(64, 256).to(dtype)
    packed = storage(kernel, shape)
    kernel.pack(weight, packed)
    error = (kernel.dequantize(packed) - weight.float()).abs().view(64, 2, 128)
    span = weight.float().view(64, 2, 128)
    if kernel.rung == "full":
        assert error.max() == 0
    elif kernel.rung == "w8":
        step = weight.float().abs().amax(1) / 127
        assert (error.amax((1, 2)) <= step * 0.75).all()  # the rounded scale may clip the largest weight
    else:
        step = (span.amax(2) - span.amin(2)) / 15
        assert (error.amax(2) <= step * 0.6 + span.abs().amax(2) / 256).all()  # the zero is rounded to bfloat16


@pytest.mark.parametrize("kind,dtype", CASES)
def test_packing_is_deterministic_in_any_chunks(kind: type[LinearKernel], dtype: torch.dtype) -> None:
    shape = LinearShape("x", 256, 256)
    if not kind.can_implement(shape, dtype, CPU)[0]:
        pytest.skip("not on this CPU")
    kernel, weight = kind(dtype), weights(256, 256).to(dtype)
    before = weight.clone()
    whole, again, pieces = (storage(kernel, shape) for _ in range(3))
    kernel.pack(weight, whole)
    kernel.pack(weight, again)
    for first in range(0, 256, 64):
        kernel.pack(weight[first : first + 64], pieces, first)
    assert torch.equal(weight, before)
    assert 64 % kernel.row_step == 0
    for name in whole:
        assert torch.equal(whole[name], again[name]) and torch.equal(whole[name], pieces[name]), name


@pytest.mark.parametrize("kind,dtype", CASES)
def test_zero_constant_and_tiny_weights_stay_finite(kind: type[LinearKernel], dtype: torch.dtype) -> None:
    shape = LinearShape("x", 64, 128)
    if not kind.can_implement(shape, dtype, CPU)[0]:
        pytest.skip("not on this CPU")
    kernel, weight = kind(dtype), torch.zeros(64, 128, dtype=dtype)
    weight[1] = 0.5
    weight[2] = -0.25
    weight[3, ::2] = 1e-30
    packed = storage(kernel, shape)
    kernel.pack(weight, packed)
    torch.testing.assert_close(kernel.dequantize(packed), weight.float(), atol=1e-6, rtol=1e-2)
    assert kernel.run(torch.ones(2, 128, dtype=dtype), packed, scratch(kernel, shape)).isfinite().all()


def test_both_ways_of_the_direct_kernels_agree() -> None:
    for kind in (AtenInt8Linear, AtenInt4Linear):
        shape = LinearShape("x", 128, 256)
        if not kind.can_implement(shape, torch.bfloat16, CPU)[0]:
            pytest.skip("not on this CPU")
        direct, indirect = kind(torch.bfloat16, 10**6), kind(torch.bfloat16, 0)
        packed = storage(direct, shape)
        direct.pack(weights(128, 256).bfloat16(), packed)
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
        one = direct.run(x, packed, scratch(direct, shape))
        other = indirect.run(x, packed, scratch(direct, shape))
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_selection_takes_the_first_that_fits() -> None:
    shape = LinearShape("o", 128, 256)
    assert select("full", shape, torch.bfloat16, CPU).name == "torch"
    assert select("w8", shape, torch.float32, CPU).name == "int8"
    assert select("w4", shape, torch.float32, CPU).name == "nibble"
    assert select("w4", LinearShape("o", 100, 256), torch.bfloat16, CPU).name == "nibble"
    assert select("w4", shape, torch.bfloat16, CPU, "nibble").name == "nibble"
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)


def test_selection_lists_every_reason() -> None:
    with pytest.raises(ConfigError) as caught:
        select("w4", LinearShape("down", 128, 320), torch.bfloat16, CPU)
    text = str(caught.value)
    assert "No w4 kernel can serve the linear 'down' (128 x 320)" in text
    assert text.count("'down' has 320 inputs, which is not a multiple of the group 128") == 2
    assert "aten-int4pack: " in text and "nibble: " in text
    with pytest.raises(ConfigError, match=r"kernels.w4 names an unknown kernel 'marlin'; known are: aten-int4pack, n"):
        select("w4", LinearShape("o", 128, 256), torch.bfloat16, CPU, "marlin")
    with pytest.raises(ConfigError, match=r"aten-int4pack: it serves bfloat16, not torch.float32"):
        select("w4", LinearShape("o", 128, 256), torch.float32, CPU, "aten-int4pack")
    for rung in ("full", "w8", "w4"):
        with pytest.raises(ConfigError, match="float16"):
            select(rung, LinearShape("o", 128, 256), torch.float16, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind,dtype", CASES[2:])
def test_a_cpu_kernel_refuses_a_gpu(kind: type[LinearKernel], dtype: torch.dtype) -> None:
    fits, reason = kind.can_implement(LinearShape("o", 128, 256), dtype, torch.device("cuda"))
    assert not fits and "it runs on cpu, not on cuda" in reason


def test_an_unknown_int4_layout_falls_back_to_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    shape = LinearShape("o", 128, 256)
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", lambda codes, k: real(codes.flip(0), k))
    probe_int4pack_layout.cache_clear()
    try:
        fits, reason = AtenInt4Linear.can_implement(shape, torch.bfloat16, CPU)
        assert not fits and "wrong values" in reason
        assert select("w4", shape, torch.bfloat16, CPU).name == "nibble"
    finally:
        probe_int4pack_layout.cache_clear()


def test_missing_operators_are_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Tensor:
        raise NotImplementedError("no such kernel here")

    shape = LinearShape("o", 128, 256)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", missing)
    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", missing)
    probe_int4pack_layout.cache_clear()
    int8_cpu._probe_int8pack.cache_clear()
    try:
        for kind in (AtenInt4Linear, AtenInt8Linear):
            fits, reason = kind.can_implement(shape, torch.bfloat16, CPU)
            assert not fits and "no such kernel here" in reason
        assert select("w8", shape, torch.bfloat16, CPU).name == "int8"
    finally:
        int4_cpu.probe_int4pack_layout.cache_clear()
        int8_cpu._probe_int8pack.cache_clear()
