"""What the KV formats keep of the numbers that go through them, and that attention on CPU reads just that."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morph_runtime.kernels import attention_cpu
from morph_runtime.kernels.attention import AttentionShape
from morph_runtime.kernels.attention_cpu import CpuPagedAttention
from morph_runtime.kernels.kv_format import FORMATS, Fp8KV, Int8KV, KVFormat, kv_scales
from morph_runtime.kernels.planes_cpu import widen_fp8
from morph_runtime.models.batch import SequenceSlice

BLOCK, HEAD_DIM = 8, 16
ERRORS = {
    ("auto", torch.bfloat16): 0.0,
    ("auto", torch.float32): 0.0,
    ("fp8", torch.bfloat16): 2**-4,
    ("fp8", torch.float32): 2**-4,
    ("int8", torch.bfloat16): 0.5 / 127,
    ("int8", torch.float32): 0.5 / 127,
}
"""Largest error of a number: a share of itself for fp8 (half of the last of 3 mantissa bits), of the largest of its
head for int8 (half a step)."""
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Of attention against float32 attention over the same stored numbers."""


@pytest.mark.parametrize("name,dtype", ERRORS)
@given(scale=st.floats(1e-3, 50), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_round_trip_errs_by_no_more_than_the_format_says(
    name: str, dtype: torch.dtype, scale: float, seed: int
) -> None:
    values = (torch.randn(9, 3, HEAD_DIM, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    kv_format = FORMATS[name](dtype)
    elements, scales = kv_format.encode(values)
    assert elements.dtype == kv_format.element
    assert (scales is not None) == kv_format.scaled
    error = (kv_format.decode(elements, scales) - values.float()).abs()
    largest = values.float().abs()
    if name == "int8":
        largest = largest.amax(-1, keepdim=True)
    least = 2**-10 if name == "fp8" else 0.0  # half of the smallest step of fp8, below 2**-6
    assert (error <= largest * ERRORS[name, dtype] * (1 + 1e-5) + least).all()


def test_fp8_saturates_and_keeps_what_it_can_hold() -> None:
    kv_format = Fp8KV(torch.float32)
    values = torch.tensor([1e6, -1e6, 448.0, 470.0, 0.0, 2.0**-9, -0.4375]).view(1, 1, -1)
    wanted = torch.tensor([448.0, -448.0, 448.0, 448.0, 0.0, 2.0**-9, -0.4375])
    torch.testing.assert_close(kv_format.decode(*kv_format.encode(values)).flatten(), wanted, atol=0, rtol=0)


def test_int8_keeps_zeros_and_very_small_and_very_large_heads() -> None:
    kv_format = Int8KV(torch.float32)
    values = torch.tensor([0.0, 1e-36, 3e38])[:, None, None] * torch.tensor([1.0, -0.5])
    decoded = kv_format.decode(*kv_format.encode(values))
    assert decoded[0].eq(0).all()
    torch.testing.assert_close(decoded[1:], values[1:], rtol=2e-2, atol=0)


def test_the_side_of_a_block_holds_one_scale_per_token_and_head() -> None:
    assert [FORMATS[name](torch.bfloat16).side_bytes(16, 8) for name in FORMATS] == [0, 0, 16 * 8 * 4]
    side = torch.zeros(5, 2 * 512, dtype=torch.uint8)[:, 512:]
    kv_scales(side, 16, 8)[3, 2, 1] = 0.25
    assert side[3].view(torch.float32)[2 * 8 + 1] == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_fp8_code_widens_to_its_own_number(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    wanted = codes.view(torch.float8_e4m3fn).to(dtype).t()
    found = widen_fp8(codes.view(torch.int8).t(), torch.empty(16, 16, dtype=dtype))
    finite = wanted.isfinite()
    assert finite.sum() == 254
    torch.testing.assert_close(found[finite], wanted[finite], atol=0, rtol=0)
    assert torch.equal(found[finite].signbit(), wanted[finite].signbit())
    assert found.isfinite().all(), "leftovers must not spoil what is masked"


class QuantizedCache:
    """Blocks of one layer among planes of others; whatever nobody has written is the worst that there is."""

    def __init__(self, kv_format: KVFormat, kv_heads: int, blocks: int) -> None:
        elements = BLOCK * kv_heads * HEAD_DIM
        side = kv_format.side_bytes(BLOCK, kv_heads)
        memory = torch.full((blocks, 3, elements + side), 0xFF, dtype=torch.uint8)  # NaN, as fp8 and as a scale
        shape = (blocks, BLOCK, kv_heads, HEAD_DIM)
        self._elements = [memory[:, n, :elements].view(kv_format.element).view(shape) for n in (1, 2)]
        self._sides = [memory[:, n, elements:] for n in (1, 2)]

    def k(self, layer: int) -> Tensor:
        return self._elements[0]

    def v(self, layer: int) -> Tensor:
        return self._elements[1]

    def k_side(self, layer: int) -> Tensor:
        return self._sides[0]

    def v_side(self, layer: int) -> Tensor:
        return self._sides[1]


@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv_heads", [(4, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("sdpa", [0, attention_cpu.SDPA_MAX_TOKENS])
@pytest.mark.parametrize("window", [0, 11])
def test_attention_reads_the_numbers_that_the_format_stores(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, heads: int, kv_heads: int, sdpa: int, window: int
) -> None:
    """Prompts in one chunk and in several, then decodes, over blocks in any order that others used before."""
    monkeypatch.setattr(attention_cpu, "SDPA_MAX_TOKENS", sdpa)
    kv_format = FORMATS[name](dtype)
    shape = AttentionShape(heads, kv_heads, HEAD_DIM, BLOCK, 128)
    cache = QuantizedCache(kv_format, kv_heads, 40)
    attention = CpuPagedAttention(shape, cache, 1, dtype, kv_format)
    generator = torch.Generator().manual_seed(4)
    order = torch.randperm(40, generator=generator).tolist()
    tables = [order[:12], order[12:20], order[20:25], order[25:26]]
    history: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tables]
    done = [0] * len(tables)
    for lengths in ([50, 9, 16, 1], [30, 1, 1, 1], [1, 1, 1, 1], [1, 2, 1, 1]):
        parts, start = [], 0
        for number, length in enumerate(lengths):
            done[number] += length
            parts.append(SequenceSlice(start, length, done[number]))
            start += length
        q, k, v = (torch.randn(start, n, HEAD_DIM, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads))
        v *= 3
        slots = [
            table[i // BLOCK] * BLOCK + i % BLOCK
            for part, table in zip(parts, tables, strict=True)
            for i in range(part.context - part.length, part.context)
        ]
        needed = [table[: -(-part.context // BLOCK)] for part, table in zip(parts, tables, strict=True)]
        plan = attention.plan(parts, needed, window)
        with torch.inference_mode():
            attention.store(k, v, torch.tensor(slots), 0, plan)
            found = attention.run(q, 0, plan)
        for number, part in enumerate(parts):
            rows = slice(part.start, part.start + part.length)
            stored = tuple(kv_format.decode(*kv_format.encode(new[rows])) for new in (k, v))
            history[number].append(stored)  # type: ignore[arg-type]
            keys, values = (
                torch.cat(list(seen)).repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
                for seen in zip(*history[number], strict=True)
            )
            columns = torch.arange(part.context)
            positions = torch.arange(part.context - part.length, part.context)[:, None]
            mask = (columns <= positions) & (columns > positions - (window or 1000))
            wanted = F.scaled_dot_product_attention(q[rows].float().transpose(0, 1), keys, values, attn_mask=mask)
            tolerance = TOLERANCES[dtype] * 3
            torch.testing.assert_close(
                found[rows].float(), wanted.transpose(0, 1).reshape(part.length, -1), atol=tolerance, rtol=tolerance
            )


def test_a_cache_whose_scales_would_lie_askew_is_refused() -> None:
    odd = AttentionShape(1, 1, 6, 1, 64)
    assert CpuPagedAttention.can_implement(odd, Fp8KV(torch.bfloat16)) == (True, "")
    fits, reason = CpuPagedAttention.can_implement(odd, Int8KV(torch.bfloat16))
    assert not fits
    assert "a block of 1 tokens has 6 numbers" in reason
    assert not CpuPagedAttention.can_implement(odd, Fp8KV(torch.float16))[0]


@pytest.mark.parametrize("name", FORMATS)
def test_the_workspace_is_as_large_as_announced(name: str) -> None:
    kv_format = FORMATS[name](torch.bfloat16)
    shape = AttentionShape(4, 2, HEAD_DIM, BLOCK, 128)
    attention = CpuPagedAttention(shape, QuantizedCache(Int8KV(torch.bfloat16), 2, 4), 0, torch.bfloat16, kv_format)
    work = attention._workspace
    held = sum(t.nbytes for t in (work.first, work.second, work.stored, work.scales))
    assert held == attention.workspace_bytes
