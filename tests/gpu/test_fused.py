from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from morph_runtime.kernels.activation import Fp8Rows
from morph_runtime.kernels.cuda import fused
from morph_runtime.kernels.cuda.rope import rope_store
from morph_runtime.kernels.pointwise import head_norm, rms_norm
from morph_runtime.kernels.pointwise import swiglu as cpu_swiglu
from morph_runtime.kernels.rope import RopeSpec, RopeTable

# Sums and products may round the last bit the other way: a step of bfloat16 is 1/128, of float16 1/1024.
ONE_STEP = {torch.float32: 1e-5, torch.float16: 1.1e-3, torch.bfloat16: 8e-3}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor | Fp8Rows, expected: Tensor, steps: float = 1) -> None:
    assert isinstance(actual, Tensor)
    limit = steps * ONE_STEP[expected.dtype]
    torch.testing.assert_close(actual.cpu(), expected, atol=limit / 100, rtol=limit)


def same_rows(actual: Tensor | Fp8Rows, x: Tensor | Fp8Rows) -> None:
    """`actual` is x quantized row by row."""
    assert isinstance(actual, Fp8Rows) and isinstance(x, Tensor)
    largest = x.float().abs().amax(1, keepdim=True)
    torch.testing.assert_close(actual.scales, torch.where(largest > 0, largest / 448, 1.0))
    restored = actual.values.float() * actual.scales
    torch.testing.assert_close(restored, x.float(), rtol=1 / 16 + 1e-5, atol=float(largest.max()) / 448 * 2**-10)


@pytest.mark.parametrize("dtype", ONE_STEP, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 4096), (7, 8192), (33, 768), (300, 4096), (2, 5120), (3, 100)])
def test_add_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    hidden, delta, weight = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, width)] * 2 + [(width,)]))
    on_gpu = hidden.cuda()

    out = fused.add_norm(on_gpu, delta.cuda(), weight.cuda(), 1e-5)

    assert torch.equal(on_gpu.cpu(), hidden + delta)
    close(out, rms_norm(hidden + delta, weight, 1e-5), steps=2)
    same_rows(fused.add_norm(on_gpu, None, weight.cuda(), 1e-5, fp8=True), out)


@pytest.mark.parametrize("dtype", ONE_STEP, ids=str)
@pytest.mark.parametrize("rows, ffn", [(1, 14336), (5, 11008), (70, 22016), (3, 100)])
def test_swiglu(rows: int, ffn: int, dtype: torch.dtype) -> None:
    gate_up = random(rows, 2 * ffn, dtype=dtype) * 3
    out = fused.swiglu(gate_up.cuda())
    close(out, cpu_swiglu(gate_up.clone()), steps=2)
    same_rows(fused.swiglu(gate_up.cuda(), fp8=True), out)


def test_quantize_rows_rounds_to_nearest() -> None:
    x = torch.cat((random(9, 4096), torch.zeros(1, 4096, dtype=torch.bfloat16))).cuda()
    rows = fused.quantize_rows(x)
    same_rows(rows, x)
    exact = (x.float() / rows.scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert (exact.float() != rows.values.float()).float().mean() < 1e-3  # division may differ in its last bit


@pytest.mark.parametrize("dtype", ONE_STEP, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(32, 8, 128), (32, 32, 128), (64, 8, 128), (3, 3, 80)])
def test_rope_store(heads: int, kv_heads: int, head_dim: int, norm: bool, dtype: torch.dtype) -> None:
    tokens, blocks, block_tokens = 50, 30, 16
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    weight = random(heads + kv_heads, head_dim, dtype=dtype, seed=5) if norm else None
    rope = RopeTable(RopeSpec(), head_dim, 4096, dtype)
    positions = torch.randint(0, 4096, (tokens,))
    slots = torch.randperm(blocks * block_tokens)[:tokens]
    slots[-1], positions[-1] = -1, 1 << 40
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    if weight is not None:
        q, k = head_norm(torch.cat((q, k), 1), weight, 1e-6).split([heads, kv_heads], 1)
    cos, sin = rope.lookup(positions[:-1])
    span = torch.full((blocks, 4, block_tokens, kv_heads, head_dim), torch.nan, dtype=dtype, device="cuda")
    on_gpu = qkv.cuda()

    rope_store(
        on_gpu,
        positions.cuda(),
        slots.cuda(),
        rope._table.cuda(),
        span[:, 2],
        span[:, 3],
        heads,
        kv_heads,
        head_dim,
        qk_norm=None if weight is None else weight.cuda(),
        eps=1e-6,
    )

    # The two products of a rotation may cancel: the error is a step of the larger one.
    limit = {"atol": 4 * ONE_STEP[dtype], "rtol": 2 * ONE_STEP[dtype]}
    rotated = on_gpu[:-1, : heads * head_dim].unflatten(1, (heads, head_dim)).cpu()
    torch.testing.assert_close(rotated, rope.rotate(q[:-1], cos, sin), **limit)
    block, offset = slots[:-1] // block_tokens, slots[:-1] % block_tokens
    cells = span.cpu()
    torch.testing.assert_close(cells[block, 2, offset], rope.rotate(k[:-1], cos, sin), **limit)
    assert torch.equal(cells[block, 3, offset], v[:-1])
    cells[block, 2:, offset] = torch.nan
    assert cells.isnan().all(), "something was written elsewhere"
