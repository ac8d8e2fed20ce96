"""The pool of block ids alone, against a model: a counter per id, what is cached since when, and a capacity."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from morph_runtime.errors import IntegrityError
from morph_runtime.kv import BlockPool, CannotShrink, NoFreeBlocks


class PoolMachine(RuleBasedStateMachine):
    """Requests come, share, keep, go; capacity comes and goes, with everything else in between."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.holders: Counter[int] = Counter(self.pool.allocate(9))
        self.mapped = self.capacity = 12
        self.plan: list[tuple[int, int]] | None = None
        self.kept: set[int] = set()
        self.cached: list[int] = []  # oldest first
        self.pool.on_evict(self.evicted)

    def evicted(self, block: int) -> None:
        assert not self.holders[block], "nothing live is evicted"
        self.kept.remove(block)
        if block in self.cached:
            assert block == self.cached[0] or block >= self.pool.capacity, "the oldest goes first, or the tail"
            self.cached.remove(block)

    def expect_free(self) -> list[int]:
        """In the order in which they are given out."""
        targets = {new for _, new in self.plan or []}
        free = set(range(self.capacity)) - set(self.holders) - targets - set(self.cached)
        return [*sorted(free), *self.cached]

    def drop(self, block: int) -> None:
        self.holders[block] -= 1
        self.holders = +self.holders
        if block in self.kept and not self.holders[block]:
            self.cached.append(block)

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        expected = self.expect_free()
        if count > len(expected):
            with pytest.raises(NoFreeBlocks):
                self.pool.allocate(count)
            return
        taken = self.pool.allocate(count)
        assert taken == expected[:count], "lowest ids first, then the oldest cached"
        self.holders.update(taken)

    @precondition(lambda self: self.holders or self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        known = sorted({*self.holders, *self.cached})
        blocks = data.draw(st.lists(st.sampled_from(known), unique=True, max_size=4))
        self.pool.share(blocks)
        self.holders.update(blocks)
        self.cached = [block for block in self.cached if block not in blocks]

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.holders)))
        self.pool.keep(block)
        self.kept.add(block)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.kept)))
        self.pool.forget(block)
        self.kept.remove(block)
        if block in self.cached:
            self.cached.remove(block)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.holders)), unique=True, min_size=1, max_size=5))
        for block in blocks:
            self.drop(block)
        self.pool.free(blocks)

    @precondition(lambda self: self.mapped == self.capacity < 20)
    @rule(more=st.integers(0, 3))
    def grow(self, more: int) -> None:
        self.mapped = self.capacity = self.capacity + more
        self.pool.grow(self.capacity)

    @precondition(lambda self: self.mapped == self.capacity)
    @rule(more_than_live=st.integers(-1, 3))
    def reserve_below(self, more_than_live: int) -> None:
        target = min(len(self.holders) + more_than_live, self.capacity - 1)
        if target < 0:
            with pytest.raises(IntegrityError):
                self.pool.reserve_below(target)
        elif len(self.holders) > target:
            with pytest.raises(CannotShrink):
                self.pool.reserve_below(target)
        else:
            self.pool.reserve_below(target)
            self.capacity = target

    @precondition(lambda self: self.mapped > self.capacity and self.plan is None)
    @rule()
    def plan_migration(self) -> None:
        tail = sorted(block for block in self.holders if block >= self.capacity)
        free = self.expect_free()
        if len(tail) > len(free):
            with pytest.raises(CannotShrink):
                self.pool.plan_migration()
            self.capacity = self.mapped
            return
        self.plan = self.pool.plan_migration()
        assert self.plan == list(zip(tail, free, strict=False))
        if self.plan:
            with pytest.raises(IntegrityError):
                self.pool.plan_migration()
            with pytest.raises(IntegrityError):
                self.pool.commit_migration(self.plan[1:])

    @precondition(lambda self: self.plan is not None)
    @rule()
    def commit(self) -> None:
        assert self.plan is not None
        self.pool.commit_migration(self.plan)
        for old, new in self.plan:
            if old in self.holders:
                self.holders[new] = self.holders.pop(old)
            if old in self.kept:
                self.kept.remove(old)
                self.kept.add(new)
        self.plan, self.mapped = None, self.capacity

    @precondition(lambda self: self.mapped > self.capacity)
    @rule()
    def cancel(self) -> None:
        self.pool.cancel_shrink()
        self.plan, self.capacity = None, self.mapped

    @precondition(lambda self: self.mapped > self.capacity)
    @rule()
    def grow_is_refused_during_a_shrink(self) -> None:
        with pytest.raises(IntegrityError):
            self.pool.grow(self.mapped + 1)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity()
        assert self.pool.capacity == self.capacity
        assert self.pool.num_used == len(self.holders)
        assert self.pool.num_free == len(self.expect_free())
        assert self.pool.num_cached == len(self.cached)
        assert all(self.pool.is_kept(block) for block in self.kept)


PoolMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestPoolAgreesWithItsModel = PoolMachine.TestCase


def shrinking() -> BlockPool:
    """Blocks 2 and 3 of four are live, and a shrink to two blocks has begun."""
    pool = BlockPool(4)
    pool.free(pool.allocate(4)[:2])
    pool.reserve_below(2)
    return pool


def test_a_block_of_the_tail_that_is_freed_during_a_shrink_is_not_given_out() -> None:
    pool = shrinking()
    pool.free([3])
    assert pool.num_free == 2
    pool.commit_migration(pool.plan_migration())
    pool.check_integrity()
    assert (pool.capacity, pool.num_used, pool.num_free) == (2, 1, 1)


def test_a_block_that_is_freed_while_it_moves_leaves_its_target_free() -> None:
    pool = shrinking()
    pairs = pool.plan_migration()
    pool.free([2])
    pool.commit_migration(pairs)
    pool.check_integrity()
    assert pool.allocate(1) == [0]


def test_a_planned_shrink_that_is_called_off_gives_targets_and_tail_back() -> None:
    pool = shrinking()
    pool.plan_migration()
    pool.cancel_shrink()
    pool.check_integrity()
    assert (pool.capacity, pool.num_used, pool.allocate(2)) == (4, 2, [0, 1])


def test_a_shrink_that_needs_a_migration_does_not_end_without_it() -> None:
    pool = shrinking()
    with pytest.raises(IntegrityError, match="without the migration"):
        pool.commit_migration([])
    assert pool.plan_migration() == [(2, 0), (3, 1)]


def test_the_integrity_check_notices_damaged_books() -> None:
    for damage in (
        "_free.append(0)", "_references.pop(0)", "_references.update({9: 1})", "_references.update({0: 0})",
        "_kept.clear()", "_kept.add(3)", "_cached.clear()", "_free.append(1)",
    ):  # fmt: skip
        pool = BlockPool(4)
        pool.allocate(2)
        pool.keep(1)
        pool.free([1])
        pool.check_integrity()
        exec(f"pool.{damage}")
        with pytest.raises(IntegrityError):
            pool.check_integrity()
