"""The memory of the KV cache: what refused or wrong calls leave behind, and how large a quantum is."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_runtime.errors import IntegrityError
from morph_runtime.kv import KVCache, KVLayout
from morph_runtime.kv import cache as cache_module
from morph_runtime.memory.arena import ArenaExhausted
from morph_runtime.memory.cpu import CpuPageArena

EXTENT = 16 * 1024
LAYOUT = KVLayout(num_layers=2, kv_heads=2, head_dim=64, block_tokens=16, dtype=torch.bfloat16)
GROUPED = [1, 2, 4]
"""All values of `planes_per_range` that two layers can have."""


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
    monkeypatch.setattr("morph_runtime.kv.cache.CHUNK_BYTES", 3 * LAYOUT.range_block_bytes)
    cache = KVCache(arena, LAYOUT, max_blocks=64)
    cache.grow(2)
    most = cache.mapped_blocks // 2
    pairs = [(most + at, at) for at in range(most)]
    for source, _ in pairs:
        for layer in range(2):
            cache.k(layer)[source] = source
            cache.v(layer)[source] = -source
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


@settings(deadline=None)
@given(
    heads=st.integers(1, 16), dim=st.sampled_from([32, 40, 64, 80, 96, 128]), tokens=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.int8]), planes=st.sampled_from([1, 2, 3, 6]),
    side=st.sampled_from([0, 64, 132]), extent=st.sampled_from([2**k for k in range(14, 22)]),
)  # fmt: skip
def test_a_quantum_is_the_smallest_growth_of_whole_blocks_and_whole_extents_in_every_range(
    heads: int, dim: int, tokens: int, dtype: torch.dtype, planes: int, side: int, extent: int
) -> None:
    layout = KVLayout(3, heads, dim, tokens, dtype, side, planes)
    assert layout.block_bytes == 6 * (tokens * heads * dim * dtype.itemsize + side)
    quantum = layout.quantum(extent)
    per_range, rest = divmod(quantum.extents, layout.num_ranges)
    assert rest == 0
    assert quantum.blocks * layout.range_block_bytes == per_range * extent
    assert math.gcd(quantum.blocks, per_range) == 1, "none smaller will do"


@settings(deadline=None)
@given(layers=st.integers(1, 100), wanted=st.integers(1, 300))
def test_planes_are_grouped_as_wished_or_in_the_next_smaller_groups_that_come_out_even(
    layers: int, wanted: int
) -> None:
    chosen = KVLayout.divisor(layers, wanted)
    assert replace(LAYOUT, num_layers=layers, planes_per_range=chosen).num_ranges * chosen == 2 * layers
    assert all(2 * layers % n for n in range(chosen + 1, min(wanted, 2 * layers) + 1))


def test_a_layout_that_does_not_come_out_even_is_refused() -> None:
    with pytest.raises(ValueError, match="4 planes cannot be cut into ranges of 3"):
        replace(LAYOUT, planes_per_range=3)
    with pytest.raises(ValueError, match="whole elements"):
        replace(LAYOUT, side_bytes=3)


def test_grouped_planes_need_a_smaller_quantum_when_extents_are_large() -> None:
    llama = KVLayout(num_layers=32, kv_heads=8, head_dim=128, block_tokens=16, dtype=torch.bfloat16)
    assert llama.quantum(2 * 2**20).blocks == 64
    grouped = replace(llama, planes_per_range=KVLayout.divisor(32, 16))
    assert (grouped.quantum(2 * 2**20).blocks, grouped.quantum(2 * 2**20).extents) == (4, 4)


def test_views_have_the_shape_of_the_contract_and_see_one_memory(arena: StubbornArena) -> None:
    cache = KVCache(arena, LAYOUT, 5)
    assert cache.max_blocks == 8
    assert cache.k(1).shape == cache.v(1).shape == (8, 16, 2, 64)
    cache.grow(1)
    cache.k(1)[3].fill_(2)
    assert cache.k(1)[3].eq(2).all()
    assert not cache.v(1)[:4].any()
    assert not cache.k(0)[:4].any()


@pytest.mark.parametrize("planes", GROUPED)
def test_every_plane_and_what_stands_beside_it_is_apart_from_the_others(arena: StubbornArena, planes: int) -> None:
    cache = KVCache(arena, replace(LAYOUT, dtype=torch.int8, side_bytes=2048, planes_per_range=planes), 8)
    cache.grow(8 // cache.quantum_blocks)
    blocks = range(cache.mapped_blocks)
    assert len(blocks) == 8
    views = [view(layer) for layer in range(2) for view in (cache.k, cache.v, cache.k_side, cache.v_side)]
    for number, view in enumerate(views):
        for block in blocks:
            view[block].fill_(number * len(blocks) + block)
    for number, view in enumerate(views):
        assert view[0].is_contiguous()
        assert all(view[block].eq(number * len(blocks) + block).all() for block in blocks)
    assert [tuple(view.shape[1:]) for view in views[1:3]] == [(16, 2, 64), (2048,)]


@pytest.mark.parametrize("planes", GROUPED)
def test_a_digest_is_over_the_content_however_planes_are_grouped(arena: StubbornArena, planes: int) -> None:
    other = CpuPageArena(16, EXTENT)
    caches = KVCache(arena, LAYOUT, 8), KVCache(other, replace(LAYOUT, planes_per_range=planes), 8)
    for cache in caches:
        cache.grow(8 // cache.quantum_blocks)
        for layer in range(2):
            for block in range(8):
                cache.k(layer)[block].fill_(10 * layer + block)
                cache.v(layer)[block].fill_(-10 * layer - block)
    assert caches[0].digest([2, 7, 1]) == caches[1].digest([2, 7, 1])
    caches[1].v(1)[7, 15, 1, 63] += 1
    assert caches[0].digest([2, 7, 1]) != caches[1].digest([2, 7, 1])
    other.close()


def test_memory_is_left_as_it_is_for_attention_that_masks_what_it_reads(arena: StubbornArena) -> None:
    span = arena.reserve("weights", 16 * EXTENT)
    arena.map(span, 0, 16)
    ctypes.memset(span.address, 0xFF, 16 * EXTENT)
    arena.unmap(span, 0, 16)
    cache = KVCache(arena, LAYOUT, 16, zeroed=False)
    cache.grow(1)
    assert cache.k(0)[: cache.mapped_blocks].isnan().all()


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


@pytest.mark.parametrize("planes", GROUPED)
@pytest.mark.parametrize("chunk", [1, cache_module.CHUNK_BYTES], ids=["block_by_block", "at_once"])
def test_copied_blocks_are_equal_in_every_layer_and_no_other_changes(
    arena: StubbornArena, monkeypatch: pytest.MonkeyPatch, planes: int, chunk: int
) -> None:
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", chunk)
    cache = KVCache(arena, replace(LAYOUT, planes_per_range=planes), 16)
    cache.grow(16 // cache.quantum_blocks)
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


def test_the_ids_of_blocks_that_move_go_to_the_device_as_it_wants_them(arena: StubbornArena) -> None:
    # Each time into the same memory, as a device with a buffer of its own does.
    sent, buffer = [], torch.zeros(8, 2, dtype=torch.int64)

    def send(pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        sent.append(list(pairs))
        return buffer[: len(pairs)].copy_(torch.tensor(pairs))

    cache = KVCache(arena, LAYOUT, 16, send=send)
    cache.grow(2)
    for block in (5, 6):
        cache.k(1)[block] = block
    cache.copy_blocks([(5, 1), (6, 0)])
    assert sent == [[(5, 1), (6, 0)]]
    assert [float(cache.k(1)[block].float().mean()) for block in (0, 1)] == [6, 5]
