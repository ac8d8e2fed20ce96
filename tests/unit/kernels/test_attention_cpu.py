from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morph_runtime.kernels import attention_cpu
from morph_runtime.kernels.attention import AttentionShape
from morph_runtime.kernels.attention_cpu import CpuPagedAttention

BLOCK = 8


@dataclass(frozen=True)
class Part:
    start: int
    length: int
    context: int


class Cache:
    """Random keys and values; blocks that no table names hold NaN."""

    def __init__(self, shape: AttentionShape, blocks: int, used: set[int], dtype: torch.dtype) -> None:
        size = (blocks, BLOCK, shape.kv_heads, shape.head_dim)
        generator = torch.Generator().manual_seed(3)
        self._k, self._v = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
        for block in set(range(blocks)) - used:
            self._k[block] = self._v[block] = torch.nan

    def k(self, layer: int) -> Tensor:
        return self._k

    def v(self, layer: int) -> Tensor:
        return self._v


def check(
    contexts: list[tuple[int, int]], heads: int, kv_heads: int, dtype: torch.dtype, max_context: int, window: int = 0
) -> int:
    """Compare a step with (length, context) per sequence to SDPA per sequence; returns the number of groups."""
    shape = AttentionShape(heads, kv_heads, 16, BLOCK, max_context)
    blocks = sum(-(-context // BLOCK) for _, context in contexts) + 5
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
    tables, parts, start = [], [], 0
    for length, context in contexts:
        tables.append([order.pop() for _ in range(-(-context // BLOCK))])
        parts.append(Part(start, length, context))
        start += length
    cache = Cache(shape, blocks, {block for table in tables for block in table}, dtype)
    # What lies behind the last token of a block that the step opens is another's leftover, not necessarily finite.
    stored = []
    for part, table in zip(parts, tables, strict=True):
        used = part.context % BLOCK
        if used:
            cache._k[table[-1], used:] = torch.nan if part.length >= used else 1e4
            cache._v[table[-1], used:] = torch.nan if part.length >= used else 1e4
        stored += [table[i // BLOCK] * BLOCK + i % BLOCK for i in range(part.context - part.length, part.context)]
    attention = CpuPagedAttention(shape, cache, 1, dtype)
    q = torch.randn(start, heads, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    plan = attention.plan(parts, tables, window)
    slots = torch.tensor(stored)
    k, v = (c.view(-1, kv_heads, 16)[slots].clone() for c in (cache._k, cache._v))
    cache._k.view(-1, kv_heads, 16)[slots] = cache._v.view(-1, kv_heads, 16)[slots] = torch.nan
    with torch.inference_mode():
        attention.store(k, v, slots, 0, plan)
        found = attention.run(q, 0, plan)
    assert found.shape == (start, heads * 16) and found.is_contiguous()
    for part, table in zip(parts, tables, strict=True):
        k, v = (c[table].reshape(-1, kv_heads, 16)[: part.context].float() for c in (cache._k, cache._v))
        k, v = (t.repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for t in (k, v))
        rows = slice(part.start, part.start + part.length)
        positions = torch.arange(part.context - part.length, part.context)
        mask = torch.arange(part.context) <= positions[:, None]
        if window:
            mask &= torch.arange(part.context) > positions[:, None] - window
        wanted = F.scaled_dot_product_attention(q[rows].float().transpose(0, 1), k, v, attn_mask=mask)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(
            found[rows].float(), wanted.transpose(0, 1).reshape(part.length, -1), atol=tolerance, rtol=tolerance
        )
    return len(plan.decodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv_heads", [(4, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize(
    "contexts",
    [
        [(1, 1)],
        [(1, 30)],
        [(1, 8), (1, 9)],
        [(1, 1), (1, 17), (1, 8), (1, 40), (1, 23)],
        [(37, 37)],
        [(5, 90)],
        [(200, 333), (1, 12), (3, 3), (1, 64), (17, 18), (1, 7)],
    ],
)
@pytest.mark.parametrize("sdpa", [0, attention_cpu.SDPA_MAX_TOKENS])
def test_equals_attention_per_sequence(
    contexts: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    sdpa: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_cpu, "SDPA_MAX_TOKENS", sdpa)
    check(contexts, heads, kv_heads, dtype, 512)


@pytest.mark.parametrize("sdpa", [0, attention_cpu.SDPA_MAX_TOKENS])
@given(
    contexts=st.lists(st.tuples(st.sampled_from([1, 1, 1, 5, 40, 150]), st.integers(0, 200)), min_size=1, max_size=6),
    window=st.sampled_from([1, 2, 7, 8, 9, 16, 63, 500]),
    heads=st.sampled_from([(4, 2), (4, 4), (3, 1)]),
)
@settings(max_examples=40, deadline=None)
def test_a_window_hides_what_lies_before_it(
    contexts: list[tuple[int, int]], window: int, heads: tuple[int, int], sdpa: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cpu, "SDPA_MAX_TOKENS", sdpa)
        check([(length, length + before) for length, before in contexts], *heads, torch.float32, 512, window)


def test_blocks_before_a_window_are_not_gathered() -> None:
    shape = AttentionShape(2, 1, 16, BLOCK, 512)
    attention = CpuPagedAttention(shape, Cache(shape, 64, set(range(64)), torch.float32), 1, torch.float32)
    plan = attention.plan([Part(0, 1, 500)], [list(range(63))], 16)
    assert plan.decodes[0].blocks.tolist() == [60, 61, 62]


def test_decodes_of_very_different_length_are_not_padded_to_the_longest() -> None:
    contexts = [(1, 4000), (1, 40), (1, 3900), (1, 44), (1, 900)]
    assert check(contexts, 2, 1, torch.float32, 4096) == 3


def test_groups_stay_inside_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "MIN_WORKSPACE_TOKENS", 64)
    assert check([(1, 30)] * 9, 2, 2, torch.float32, 64) == 5


def test_padding_of_a_group_is_bounded() -> None:
    shape = AttentionShape(2, 1, 16, BLOCK, 8192)
    attention = CpuPagedAttention(shape, Cache(shape, 1, set(), torch.float32), 1, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        contexts = torch.randint(1, 8192, (24,), generator=generator).tolist()
        parts = [Part(i, 1, context) for i, context in enumerate(contexts)]
        groups = attention._group(list(range(24)), parts)
        assert sorted(i for group in groups for i in group) == list(range(24))
        for group in groups:
            sizes = [-(-contexts[i] // BLOCK) * BLOCK for i in group]
            padded = max(sizes) * len(sizes)
            assert padded <= max(attention_cpu.WASTE * sum(sizes), sum(sizes) + attention_cpu.CHEAP_TOKENS)
            assert padded <= max(8192, attention_cpu.MIN_WORKSPACE_TOKENS)
