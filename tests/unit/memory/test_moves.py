"""Moves that another thread does: in their order, each extent in one place, and every refusal accounted for."""

from __future__ import annotations

import threading
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memory.stub_driver import HandWorker, StubDriver
from morph_runtime.errors import IntegrityError
from morph_runtime.memory.arena import ArenaExhausted, VirtualRange
from morph_runtime.memory.cpu import CpuPageArena
from morph_runtime.memory.fence import DoneFence, Fence
from morph_runtime.memory.moves import Move, MoveWorker, ThreadWorker

EXTENT = 16 * 1024
SIZES = (5, 9, 16)


class LineMachine(RuleBasedStateMachine):
    """Maps and unmaps are ordered, done some time later and refused now and then; the owner looks when it likes."""

    @initialize(total=st.integers(2, 20))
    def start(self, total: int) -> None:
        self.arena, self.worker = CpuPageArena(total, EXTENT), HandWorker()
        self.spans = [self.arena.reserve(f"range{i}", size * EXTENT) for i, size in enumerate(SIZES)]
        self.driver = StubDriver(self.arena, self.worker)
        self.mapping: list[tuple[VirtualRange, range, Move]] = []

    @rule(which=st.integers(0, 2), first=st.integers(0, 15), count=st.integers(0, 8))
    def map(self, which: int, first: int, count: int) -> None:
        span = self.spans[which]
        before = list(span.physical), self.arena.free_extents
        try:
            move = self.arena.map(span, first, count)
        except (ArenaExhausted, IntegrityError):
            assert (list(span.physical), self.arena.free_extents) == before
            return
        self.mapping.append((span, range(first, first + count), move))

    @rule(which=st.integers(0, 2), first=st.integers(0, 15), count=st.integers(0, 8))
    def unmap(self, which: int, first: int, count: int) -> None:
        span = self.spans[which]
        if any(s is span and set(pieces) & set(range(first, first + count)) for s, pieces, _ in self.mapping):
            return  # its owner sees to the mapping first
        try:
            self.arena.unmap(span, first, count)
        except IntegrityError:
            return

    @rule(count=st.integers(1, 4))
    def the_worker_gets_on(self, count: int) -> None:
        self.worker.step(count)

    @rule(nth=st.integers(1, 4))
    def a_mapping_will_be_refused(self, nth: int) -> None:
        self.driver.refuse_map_in = nth

    @rule(nth=st.integers(1, 4))
    def an_unmapping_will_be_refused(self, nth: int) -> None:
        self.driver.refuse_unmap_in = nth

    @rule()
    def look(self) -> None:
        """As the step thread does; what is done may be touched."""
        try:
            self.arena.check_moves()
        except (OSError, IntegrityError):
            assert self.arena.is_settled, "all that was behind is undone"
            self.mapping = [entry for entry in self.mapping if not entry[2].failed]
        for entry in [entry for entry in self.mapping if entry[2].done()]:
            self.mapping.remove(entry)
            span, pieces, move = entry
            if move.failure() is None:
                assert self.driver.has(span, pieces)

    @invariant()
    def every_extent_is_in_one_place(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check_integrity()
            self.driver.check()

    @invariant()
    def when_all_is_quiet_the_books_are_true(self) -> None:
        if hasattr(self, "arena") and self.arena.is_settled and not self.arena._line._broken:  # type: ignore[union-attr]
            assert self.driver.agrees()

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.driver.refuse_map_in = self.driver.refuse_unmap_in = 0
            self.worker.step()
            self.look()
            self.arena.settle()
            assert self.driver.agrees()
            self.arena.close()


LineMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTheLineKeepsTheBooks = LineMachine.TestCase


def arena_with(worker: MoveWorker) -> tuple[CpuPageArena, StubDriver, list[VirtualRange]]:
    arena = CpuPageArena(4, EXTENT)
    spans = [arena.reserve(name, 4 * EXTENT) for name in ("one", "two")]
    return arena, StubDriver(arena, worker), spans


def test_an_extent_is_promised_before_it_has_left_and_comes_after() -> None:
    worker = HandWorker()
    arena, driver, (one, two) = arena_with(worker)
    arena.map(one, 0, 4).finish()
    arena.unmap(one, 0, 3)
    coming = arena.map(two, 1, 2)
    assert (one.mapped, two.mapped, arena.free_extents) == (1, 2, 1)
    assert len(driver.behind) == 4 and not coming.done()
    worker.step(1)
    assert len(driver.behind) == 1 and not coming.done()
    worker.step(1)
    assert coming.done() and driver.agrees() and not coming.failed
    arena.close()


def test_a_refused_mapping_leaves_what_is_ordered_behind_it_alone() -> None:
    worker = HandWorker()
    arena, driver, (one, two) = arena_with(worker)
    driver.refuse_map_in = 1
    refused, kept = arena.map(one, 0, 2), arena.map(two, 0, 2)
    worker.step()
    assert arena.free_extents == 0 and not arena.is_settled, "until its owner has seen it"
    arena.check_moves()
    with pytest.raises(OSError, match="no mapping to be had"):
        refused.finish()
    kept.finish()
    assert (one.mapped, two.mapped, arena.free_extents) == (0, 2, 2)
    assert arena.is_settled and driver.agrees()
    arena.close()


def test_a_mapping_of_several_runs_that_is_refused_half_way_is_taken_back() -> None:
    worker = HandWorker()
    arena, driver, (one, two) = arena_with(worker)
    arena.map(one, 0, 4).finish()
    for piece in (0, 2):
        arena.unmap(one, piece, 1)  # two free extents that are no neighbours
    arena.settle()
    driver.refuse_map_in = 2
    move = arena.map(two, 0, 2)
    assert isinstance(move.failure(), OSError)
    assert (two.mapped, arena.free_extents) == (0, 2) and driver.agrees()

    driver.refuse_map_in, driver.refuse_unmap_in = 2, 1
    move = arena.map(two, 0, 2)
    later = arena.unmap(one, 1, 1)
    worker.step()
    with pytest.raises(IntegrityError, match=r"neither ended .* nor undone"):
        arena.check_moves()
    arena.check_integrity()
    assert two.mapped == 2 and one.mapped == 2, "half of it may be there: nobody gets these extents"
    assert later.failed
    arena.close()


def test_whoever_waits_for_an_extent_that_does_not_leave_is_refused_too() -> None:
    worker = HandWorker()
    arena, driver, (one, two) = arena_with(worker)
    arena.map(one, 0, 4).finish()
    driver.refuse_unmap_in = 1
    arena.unmap(one, 0, 2)
    coming = arena.map(two, 0, 2)
    arena.unmap(one, 2, 1)
    worker.step()
    assert len(driver.behind) == 4 and coming.failed
    late = arena.map(two, 2, 1)  # ordered before anybody has looked
    with pytest.raises(OSError, match="no memory to be had back"):
        arena.check_moves()
    assert (one.mapped, two.mapped, arena.free_extents) == (4, 0, 0) and driver.agrees()
    for move in (coming, late):
        with pytest.raises(OSError, match="no memory to be had back"):
            move.finish()
    assert (one.mapped, two.mapped, arena.free_extents) == (4, 0, 0), "books are put back once"
    arena.unmap(one, 0, 4)
    arena.map(two, 0, 4).finish()
    assert driver.agrees()
    arena.close()


def wait_for(event: threading.Event) -> None:
    assert event.wait(60)


def test_the_owner_goes_on_while_the_thread_moves_and_is_woken() -> None:
    gate, woken = threading.Event(), threading.Event()
    worker = ThreadWorker("moves", woken.set)
    arena, driver, (one, two) = arena_with(worker)
    worker.put(partial(wait_for, gate))
    moves = [arena.map(one, 0, 4), arena.unmap(one, 0, 4), arena.map(two, 0, 4)]
    assert not any(move.done() for move in moves) and not woken.is_set()
    arena.check_moves()
    gate.set()
    moves[-1].wait()
    assert all(move.done() for move in moves) and driver.agrees() and two.mapped == 4
    assert woken.wait(60)
    arena.unmap(two, 0, 4)
    assert arena._line is not None
    arena._line.close()
    assert not driver.behind, "closing does what was ordered"
    arena.close()


def test_who_is_woken_finds_the_move_done() -> None:
    found = []
    worker = ThreadWorker("moves", lambda: found.append(move.done()))
    move: Fence = DoneFence()
    ready = threading.Event()
    worker.put(partial(wait_for, ready))
    move = worker.put(lambda: None)
    ready.set()
    worker.close()
    assert found == [False, True]
