"""Arena, KV memory and block ids together: whatever is live keeps its content through growth, shrinking and moves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from morph_runtime.errors import IntegrityError
from morph_runtime.kv import BlockPool, CannotShrink, KVCache, KVLayout, NoFreeBlocks
from morph_runtime.memory.arena import ArenaExhausted
from morph_runtime.memory.cpu import CpuPageArena

EXTENT = 16 * 1024
LAYOUTS = [
    KVLayout(2, 2, 64, 16, torch.bfloat16),  # several blocks to an extent
    KVLayout(2, 8, 64, 32, torch.float32),  # several extents to a block
    KVLayout(1, 3, 40, 16, torch.bfloat16),  # neither divides the other
    KVLayout(3, 1, 64, 16, torch.bfloat16, planes_per_range=6),  # all planes in one range
    KVLayout(4, 2, 64, 16, torch.bfloat16, planes_per_range=2),  # K and V of a layer together
    KVLayout(3, 2, 64, 16, torch.int8, side_bytes=128, planes_per_range=2),  # something beside the elements
    KVLayout(2, 3, 40, 8, torch.int8, side_bytes=64, planes_per_range=4),
]


class KVMachine(RuleBasedStateMachine):
    @initialize(layout=st.sampled_from(LAYOUTS))
    def start(self, layout: KVLayout) -> None:
        quantum = layout.quantum(EXTENT)
        assert quantum.blocks * layout.range_block_bytes % EXTENT == 0
        self.arena = CpuPageArena(quantum.extents * 6, EXTENT)
        self.cache = KVCache(self.arena, layout, quantum.blocks * 8)
        self.weights = self.arena.reserve("weights", quantum.extents * 6 * EXTENT)
        self.pool = BlockPool(0)
        self.tables: list[tuple[list[int], bytes]] = []
        self.fill = 0

    def write(self, blocks: list[int]) -> bytes:
        """Give these blocks content of their own; returns its digest."""
        for layer in range(self.cache.layout.num_layers):
            cache = self.cache
            for tensor in (cache.k(layer), cache.v(layer), cache.k_side(layer), cache.v_side(layer)):
                for block in blocks:
                    self.fill += 1
                    tensor[block].fill_(self.fill % 127)
        return self.cache.digest(blocks)

    @rule(quanta=st.integers(0, 4))
    def grow(self, quanta: int) -> None:
        before = self.cache.mapped_blocks
        try:
            self.cache.grow(quanta)
        except ArenaExhausted:
            assert self.cache.mapped_blocks == before
            return
        for view in (self.cache.k(0), self.cache.v_side(self.cache.layout.num_layers - 1)):
            fresh = view[before : self.cache.mapped_blocks]
            assert not fresh.any(), "memory that held something else must be zeroed"
        self.pool.grow(self.cache.mapped_blocks)

    @rule(count=st.integers(0, 12))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        try:
            blocks = self.pool.allocate(count)
        except NoFreeBlocks:
            assert count > free
            assert self.pool.num_free == free
            return
        self.tables.append((blocks, self.write(blocks)))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.tables:
            self.pool.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))[0])

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.tables:
            blocks, digest = self.tables[data.draw(st.integers(0, len(self.tables) - 1))]
            used = self.pool.num_used
            self.pool.share(blocks)
            assert self.pool.num_used == used
            self.tables.append((list(blocks), digest))

    @rule(share=st.floats(0, 1))
    def weights_come(self, share: float) -> None:
        """Weights take free extents and leave in them what reads as NaN."""
        count = int(self.arena.free_extents * share)
        first = self.weights.mapped
        self.arena.map(self.weights, first, count)
        if count:
            self.arena.tensor(self.weights, first * EXTENT, (count * EXTENT,), torch.uint8).fill_(0xFF)

    @rule(share=st.floats(0, 1))
    def weights_go(self, share: float) -> None:
        count = int(self.weights.mapped * share)
        self.arena.unmap(self.weights, self.weights.mapped - count, count)

    @rule(quanta=st.integers(1, 3))
    def shrink(self, quanta: int) -> None:
        smaller = self.cache.mapped_blocks - quanta * self.cache.quantum_blocks
        if smaller < 0:
            with pytest.raises(IntegrityError):
                self.cache.shrink(quanta)
            return
        capacity = self.pool.capacity
        try:
            self.pool.reserve_below(smaller)
        except CannotShrink:
            assert self.pool.num_used > smaller
            assert self.pool.capacity == capacity
            return
        pairs = self.pool.plan_migration()
        if pairs:
            self.cache.copy_blocks(pairs)
        moved = dict(pairs)
        self.tables = [([moved.get(b, b) for b in blocks], digest) for blocks, digest in self.tables]
        self.pool.commit_migration(pairs)
        self.cache.shrink(quanta)
        assert self.pool.capacity == self.cache.mapped_blocks == smaller

    @invariant()
    def everything_live_is_as_it_was_written(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check_integrity()
            self.pool.check_integrity()
            for blocks, digest in self.tables:
                assert self.cache.digest(blocks) == digest
            assert self.pool.num_used == len({block for blocks, _ in self.tables for block in blocks})
            kv_bytes = self.cache.mapped_blocks * self.cache.layout.block_bytes
            assert sum(self.arena.resident_bytes().values()) == kv_bytes + self.weights.mapped * EXTENT

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.close()


KVMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLiveBlocksKeepTheirContent = KVMachine.TestCase


def test_the_lowest_block_is_handed_out_first_so_that_the_tail_drains() -> None:
    pool = BlockPool(6)
    first = pool.allocate(4)
    pool.free(first[:2])
    assert pool.allocate(3) == [0, 1, 4]


def test_a_shared_block_lives_until_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_used == 1
    pool.free(blocks)
    assert pool.num_used == 0


def test_wrong_use_is_noticed() -> None:
    pool = BlockPool(2)
    with pytest.raises(IntegrityError, match="freed but not live"):
        pool.free([0])
    with pytest.raises(IntegrityError, match="shared but not live"):
        pool.share([0])
    with pytest.raises(IntegrityError, match="cannot grow"):
        pool.grow(1)
    with pytest.raises(IntegrityError, match="cannot shrink"):
        pool.reserve_below(3)


def test_a_shrink_that_was_called_off_gives_the_tail_out_again() -> None:
    pool = BlockPool(4)
    held = pool.allocate(3)
    pool.free(held[:2])
    pool.reserve_below(2)
    taken = pool.allocate(2)  # a decode took what the migration would have needed
    with pytest.raises(CannotShrink):
        pool.plan_migration()
    pool.check_integrity()
    assert pool.capacity == 4
    assert pool.num_free == 1
    pool.free([*taken, held[2]])
    assert pool.num_free == 4
