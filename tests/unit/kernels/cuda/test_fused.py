from __future__ import annotations

import pytest
import torch
from torch import Tensor

from morph_runtime.kernels.activation import Fp8Rows
from morph_runtime.kernels.cuda import fused
from morph_runtime.kernels.cuda.rope import rope_store
from morph_runtime.kernels.pointwise import head_norm, rms_norm
from morph_runtime.kernels.pointwise import swiglu as cpu_swiglu
from morph_runtime.kernels.rope import RopeSpec, RopeTable

# The interpreter cuts bfloat16 and FP8 off where the GPU rounds to nearest, and loses a carry now and then: float16
# stands in here for bfloat16, and FP8 may miss by a step of e4m3 (1/8), some values by more. tests/gpu is exact.
ONE_ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3}
FP8_STEP = 1 / 8 + 1e-3


def random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor | Fp8Rows, expected: Tensor) -> None:
    assert isinstance(actual, Tensor)
    limit = ONE_ROUNDING[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=limit / 4, rtol=limit)


def same_rows(actual: Tensor | Fp8Rows, x: Tensor) -> None:
    """`actual` is x quantized row by row."""
    assert isinstance(actual, Fp8Rows)
    largest = x.float().abs().amax(1, keepdim=True)
    scales = torch.where(largest > 0, largest / 448, 1.0)
    torch.testing.assert_close(actual.scales, scales)
    wrong = (actual.values.float() * actual.scales - x.float()).abs() > FP8_STEP * x.float().abs() + 1e-3
    assert wrong.float().mean() < 0.05


@pytest.mark.parametrize("dtype", ONE_ROUNDING, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 64), (5, 100), (3, 768)])
def test_add_norm_adds_in_place_and_normalizes(rows: int, width: int, dtype: torch.dtype) -> None:
    hidden, delta, weight = (
        random(rows, width, dtype=dtype),
        random(rows, width, dtype=dtype, seed=1),
        random(width, dtype=dtype, seed=2),
    )
    expected_hidden = hidden + delta

    out = fused.add_norm(hidden, delta, weight, 1e-5)

    assert torch.equal(hidden, expected_hidden)
    close(out, rms_norm(expected_hidden, weight, 1e-5))


def test_add_norm_without_a_delta_leaves_the_stream() -> None:
    hidden, weight = random(3, 96), random(96, seed=1)
    before = hidden.clone()
    close(fused.add_norm(hidden, None, weight, 1e-6), rms_norm(before, weight, 1e-6))
    assert torch.equal(hidden, before)


def test_fp8_outputs_are_the_plain_outputs_quantized() -> None:
    hidden, weight, gate_up = random(4, 96), random(96, seed=1), random(4, 2 * 80, seed=3)
    plain, quantized = (fused.add_norm(hidden, None, weight, 1e-6, fp8=fp8) for fp8 in (False, True))
    assert isinstance(plain, Tensor) and isinstance(quantized, Fp8Rows)
    rows = fused.quantize_rows(plain)
    assert torch.equal(rows.values.view(torch.uint8), quantized.values.view(torch.uint8))
    assert torch.equal(rows.scales, quantized.scales)
    same_rows(quantized, plain)
    activated = fused.swiglu(gate_up)
    assert isinstance(activated, Tensor)
    same_rows(fused.swiglu(gate_up, fp8=True), activated)


def test_a_row_of_zeros_stays_zeros_in_fp8() -> None:
    rows = fused.quantize_rows(torch.zeros(2, 48, dtype=torch.float16))
    assert (rows.values.float() == 0).all() and rows.scales.isfinite().all()


@pytest.mark.parametrize("dtype", ONE_ROUNDING, ids=str)
@pytest.mark.parametrize("rows, ffn", [(1, 48), (3, 1500)])
def test_swiglu(rows: int, ffn: int, dtype: torch.dtype) -> None:
    gate_up = random(rows, 2 * ffn, dtype=dtype) * 3
    close(fused.swiglu(gate_up), cpu_swiglu(gate_up.clone()))


def test_rows_may_be_part_of_wider_rows() -> None:
    wide = random(4, 256)
    part = wide[:, 64:160]
    same_rows(fused.quantize_rows(part), part)
    close(fused.swiglu(part), cpu_swiglu(part.clone()))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="delta"):
        fused.add_norm(random(2, 8), random(2, 4), random(8), 1e-5)
    with pytest.raises(ValueError, match="weights"):
        fused.add_norm(random(2, 8), None, random(4), 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        fused.quantize_rows(random(8, 2).T)


@pytest.mark.parametrize("dtype", ONE_ROUNDING, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads, kv_heads, head_dim, block_tokens", [(4, 2, 16, 16), (3, 3, 80, 8), (14, 2, 64, 32)])
def test_rope_store_rotates_and_stores(
    heads: int, kv_heads: int, head_dim: int, block_tokens: int, norm: bool, dtype: torch.dtype
) -> None:
    tokens, blocks = 6, 5
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    weight = random(heads + kv_heads, head_dim, dtype=dtype, seed=5) if norm else None
    rope = RopeTable(RopeSpec(), head_dim, 40, dtype)
    positions = torch.tensor([0, 1, 2, 39, 17, 999])  # the last is a padding row
    slots = torch.tensor([0, 3 * block_tokens + 1, block_tokens, blocks * block_tokens - 1, 2, -1])
    span = torch.full((blocks, 4, block_tokens, kv_heads, head_dim), torch.nan, dtype=dtype)
    k_cache, v_cache = span[:, 2], span[:, 3]
    q, k, v = qkv.clone().unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    if weight is not None:
        q, k = head_norm(torch.cat((q, k), 1), weight, 1e-6).split([heads, kv_heads], 1)
    cos, sin = rope.lookup(positions[:-1])

    rope_store(
        qkv, positions, slots, rope._table, k_cache, v_cache, heads, kv_heads, head_dim, qk_norm=weight, eps=1e-6
    )

    close(qkv[:-1, : heads * head_dim].unflatten(1, (heads, head_dim)), rope.rotate(q[:-1], cos, sin))
    block, offset = slots[:-1] // block_tokens, slots[:-1] % block_tokens
    close(k_cache[block, offset], rope.rotate(k[:-1], cos, sin))
    assert torch.equal(v_cache[block, offset], v[:-1])
    k_cache[block, offset] = v_cache[block, offset] = torch.nan
    assert span.isnan().all(), "something was written elsewhere"


def test_an_fp8_cache_takes_rounded_and_bounded_values() -> None:
    qkv = random(2, 4 * 16) * 100
    rope = RopeTable(RopeSpec(), 16, 8, torch.float16)
    k_cache, v_cache = (torch.zeros(1, 16, 1, 16, dtype=torch.float8_e4m3fn) for _ in range(2))
    v = qkv[:, -16:].float().clamp(-448, 448)

    rope_store(qkv, torch.tensor([3, 4]), torch.tensor([0, 5]), rope._table, k_cache, v_cache, 2, 1, 16)

    torch.testing.assert_close(v_cache[0, [0, 5], 0].float(), v, rtol=FP8_STEP, atol=1e-2)
    assert k_cache.float().isfinite().all()
