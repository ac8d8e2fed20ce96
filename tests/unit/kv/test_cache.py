"""The memory of the KV cache: what refused or wrong calls leave behind, and how large a quantum is."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morph_runtime.errors import IntegrityError
from morph_runtime.kv import KVCache, KVLayout
from morph_runtime.memory.arena import ArenaExhausted
from morph_runtime.memory.cpu import CpuPageArena

EXTENT = 16 * 1024
LAYOUT = KVLayout(num_layers=2, kv_heads=2, head_dim=64, block_tokens=16, dtype=torch.bfloat16)


class StubbornArena(CpuPageArena):
    """The system refuses the n-th mapping from now."""

    refuse_in = 0

    def _map(self, address: int, extent: int, count: int) -> None:
        self.refuse_in -= 1
        if self.refuse_in == 0:
            raise OSError(12, "Cannot allocate memory")
        super()._map(address, extent, count)


@pytest.fixture
def arena() -> Iterator[StubbornArena]:
    arena = StubbornArena(16, EXTENT)
    yield arena
    arena.close()


def test_blocks_are_copied_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = StubbornArena(64, EXTENT)
    cache = KVCache(arena, LAYOUT, max_blocks=64)
    cache.grow(2)
    most = cache.mapped_blocks // 2
    pairs = [(most + at, at) for at in range(most)]
    for source, _ in pairs:
        for layer in range(2):
            cache.k(layer)[source] = source
            cache.v(layer)[source] = -source
    monkeypatch.setattr("morph_runtime.kv.cache.COPY_BYTES", 3 * cache.k(0)[0].nbytes)
    sizes: list[int] = []
    select = torch.Tensor.index_select

    def watched(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        sizes.append(len(index))
        return select(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", watched)
    cache.copy_blocks(pairs)
    monkeypatch.undo()
    assert max(sizes) == 3 and sum(sizes) == 4 * most
    assert cache.digest([source for source, _ in pairs]) == cache.digest([target for _, target in pairs])
    arena.close()


@given(
    heads=st.integers(1, 16), dim=st.sampled_from([32, 40, 64, 80, 96, 128]), tokens=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]), extent=st.sampled_from([2**k for k in range(14, 22)]),
)  # fmt: skip
def test_a_quantum_is_the_smallest_growth_of_whole_blocks_and_whole_extents_in_every_range(
    heads: int, dim: int, tokens: int, dtype: torch.dtype, extent: int
) -> None:
    layout = KVLayout(3, heads, dim, tokens, dtype)
    quantum = layout.quantum(extent)
    per_range, rest = divmod(quantum.extents, layout.num_ranges)
    assert rest == 0
    assert quantum.blocks * layout.range_block_bytes == per_range * extent
    assert all(n * layout.range_block_bytes % extent for n in range(1, quantum.blocks)), "none smaller will do"


def test_views_have_the_shape_of_the_contract_and_see_one_memory(arena: StubbornArena) -> None:
    cache = KVCache(arena, LAYOUT, 5)
    assert cache.max_blocks == 8
    assert cache.k(1).shape == cache.v(1).shape == (8, 16, 2, 64)
    cache.grow(1)
    cache.k(1)[3].fill_(2)
    assert cache.k(1)[3].eq(2).all()
    assert not cache.v(1)[:4].any()
    assert not cache.k(0)[:4].any()


def test_new_memory_is_zeroed_even_if_it_held_nan(arena: StubbornArena) -> None:
    span = arena.reserve("weights", 16 * EXTENT)
    arena.map(span, 0, 16)
    ctypes.memset(span.address, 0xFF, 16 * EXTENT)
    arena.unmap(span, 0, 16)
    cache = KVCache(arena, LAYOUT, 16)
    cache.grow(4)
    assert all(cache.k(layer).eq(0).all() and cache.v(layer).eq(0).all() for layer in range(2))


def test_a_shortage_or_a_wrong_call_leaves_the_cache_as_it_was(arena: StubbornArena) -> None:
    cache = KVCache(arena, LAYOUT, 20)
    cache.grow(3)
    for call, error in (
        (lambda: cache.grow(2), ArenaExhausted),
        (lambda: cache.grow(-1), ValueError),
        (lambda: cache.shrink(4), IntegrityError),
        (lambda: cache.shrink(-1), ValueError),
    ):
        with pytest.raises(error):
            call()
        assert (cache.mapped_blocks, arena.free_extents) == (12, 4)
        arena.check_integrity()
    with pytest.raises(ValueError, match="cannot reserve"):
        KVCache(arena, LAYOUT, 4)


def test_the_cache_does_not_grow_past_its_addresses(arena: StubbornArena) -> None:
    cache = KVCache(arena, LAYOUT, 8)
    with pytest.raises(IntegrityError, match="8 at most"):
        cache.grow(3)
    assert (cache.mapped_blocks, arena.free_extents) == (0, 16)


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_mapping_that_the_system_refuses_leaves_the_cache_as_it_was(arena: StubbornArena, nth: int) -> None:
    cache = KVCache(arena, LAYOUT, 16)
    cache.grow(1)
    cache.k(0)[:4].fill_(3)
    digest = cache.digest([0, 1, 2, 3])
    arena.refuse_in = nth
    with pytest.raises(OSError, match="Cannot allocate"):
        cache.grow(2)
    arena.check_integrity()
    assert (cache.mapped_blocks, arena.free_extents) == (4, 12)
    assert cache.digest([0, 1, 2, 3]) == digest
    cache.grow(3)
    assert cache.mapped_blocks == 16


def test_copied_blocks_are_equal_in_every_layer_and_no_other_changes(arena: StubbornArena) -> None:
    cache = KVCache(arena, LAYOUT, 16)
    cache.grow(4)
    for layer in range(2):
        for tensor in (cache.k(layer), cache.v(layer)):
            tensor.copy_(torch.randn(tensor.shape))
    others = [b for b in range(16) if b not in (1, 4)]
    before = cache.digest([15, 9]), cache.digest(others)
    cache.copy_blocks([(15, 1), (9, 4)])
    assert (cache.digest([1, 4]), cache.digest(others)) == before
    assert cache.digest([1, 4]) != cache.digest([4, 1])
    cache.copy_blocks([])
    assert cache.digest(others) == before[1]
