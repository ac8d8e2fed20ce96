"""Pages move between ranges: none is lost, none is in two places, and the process does not grow."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memory.alone import run_alone
from morph_runtime.errors import ConfigError, IntegrityError
from morph_runtime.memory.arena import UNMAPPED, ArenaExhausted, VirtualRange, runs
from morph_runtime.memory.cpu import CpuPageArena
from morph_runtime.memory.smaps import available_bytes, range_rss_bytes

EXTENT = 16 * 1024


class ArenaMachine(RuleBasedStateMachine):
    """Random maps and unmaps over several ranges; every mapped extent carries a stamp that must stay."""

    @initialize(total=st.integers(1, 24))
    def start(self, total: int) -> None:
        self.arena = CpuPageArena(total, EXTENT)
        self.spans = [self.arena.reserve(f"range{i}", size * EXTENT) for i, size in enumerate((5, 9, 1, 16))]
        self.views = [self.arena.tensor(s, 0, (s.extents, EXTENT // 8), torch.int64) for s in self.spans]
        self.stamps: dict[tuple[int, int], int] = {}
        self.stamp = 0

    @rule(which=st.integers(0, 3), first=st.integers(0, 16), count=st.integers(0, 12))
    def map(self, which: int, first: int, count: int) -> None:
        span = self.spans[which]
        before = list(span.physical), self.arena.free_extents
        try:
            self.arena.map(span, first, count)
        except (ArenaExhausted, IntegrityError):
            assert (list(span.physical), self.arena.free_extents) == before
            return
        for piece in range(first, first + count):
            self.stamp += 1
            self.views[which][piece].fill_(self.stamp)
            self.stamps[which, piece] = self.stamp

    @rule(which=st.integers(0, 3), first=st.integers(0, 16), count=st.integers(0, 12))
    def unmap(self, which: int, first: int, count: int) -> None:
        span = self.spans[which]
        before = list(span.physical), self.arena.free_extents
        try:
            self.arena.unmap(span, first, count)
        except IntegrityError:
            assert (list(span.physical), self.arena.free_extents) == before
            return
        for piece in range(first, first + count):
            del self.stamps[which, piece]

    @invariant()
    def books_agree_and_contents_stay(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check_integrity()
            for (which, piece), stamp in self.stamps.items():
                assert bool((self.views[which][piece] == stamp).all())
            mapped = {(w, p) for w, s in enumerate(self.spans) for p, e in enumerate(s.physical) if e != UNMAPPED}
            assert mapped == set(self.stamps)

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.close()


ArenaMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestArenaKeepsItsBooks = ArenaMachine.TestCase


MOVE = """
import torch
from morph_runtime.memory.cpu import CpuPageArena
from morph_runtime.memory.smaps import process_rss_bytes, range_rss_bytes
size, extent = 64 << 20, 16 << 10
arena = CpuPageArena(size // extent, extent)
one, two = arena.reserve("one", size), arena.reserve("two", size)
arena.map(one, 0, size // extent)
arena.tensor(one, 0, (size,), torch.uint8).fill_(1)
before = process_rss_bytes()
arena.unmap(one, 0, size // extent)
arena.map(two, 0, size // extent)
kept = bool((arena.tensor(two, 0, (size,), torch.uint8) == 1).all())
print(json.dumps([kept, process_rss_bytes() - before, *(range_rss_bytes(r.address, size) for r in (one, two))]))
"""


def test_moving_memory_between_ranges_keeps_the_process_as_large_as_it_was() -> None:
    kept, growth, first, second = run_alone(MOVE)
    assert kept, "pages move with what they hold"
    tolerance = 4 * 2**20  # a second copy of what moved would be 64 MiB
    assert abs(growth) < tolerance
    assert (first, second) == (0, 64 * 2**20)


@pytest.mark.parametrize("prefault", [True, False])
def test_a_mapped_range_is_resident_at_once_if_prefaulted(prefault: bool) -> None:
    arena = CpuPageArena(8, EXTENT, prefault=prefault)
    span = arena.reserve("range", 8 * EXTENT)
    arena.map(span, 2, 4)
    assert range_rss_bytes(span.address, 8 * EXTENT) == (4 * EXTENT if prefault else 0)
    arena.close()


class StubbornArena(CpuPageArena):
    """The system refuses the n-th mapping from now, and as it may, leaves a hole where that should have gone."""

    refuse_in = 0

    def _mmap(self, address: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
        self.refuse_in -= 1
        if self.refuse_in == 0:
            if fd >= 0:
                self._libc.munmap(address, nbytes)
            raise OSError(12, "Cannot allocate memory")
        return super()._mmap(address, nbytes, protection, flags, fd, offset)


def reserved(span: VirtualRange) -> int:
    """Bytes of the range's addresses that are taken, with memory or without."""
    total, end = 0, span.address + span.extents * EXTENT
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            total += max(0, min(high, end) - max(low, span.address))
    return total


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_mapping_that_the_system_refuses_halfway_leaves_the_books_as_they_were(nth: int) -> None:
    arena = StubbornArena(7, EXTENT)
    comb, span = arena.reserve("comb", 7 * EXTENT), arena.reserve("range", 8 * EXTENT)
    arena.map(comb, 0, 7)
    for piece in (0, 2, 4):
        arena.unmap(comb, piece, 1)  # three free extents, no two of them neighbours: three mappings
    arena.refuse_in = nth
    with pytest.raises(OSError, match="Cannot allocate"):
        arena.map(span, 1, 3)
    arena.check_integrity()
    assert arena.free_extents == 3
    assert span.mapped == range_rss_bytes(span.address, 8 * EXTENT) == 0
    assert reserved(span) == 8 * EXTENT, "a hole could be given to another mapping"
    arena.map(span, 1, 3)
    assert span.mapped == 3
    arena.refuse_in = 1
    with pytest.raises(OSError, match="Cannot allocate"):
        arena.unmap(span, 1, 3)
    arena.check_integrity()
    assert span.mapped == 3
    arena.close()


def test_freed_neighbours_are_mapped_in_one_piece_again() -> None:
    arena = CpuPageArena(64, EXTENT)
    parts = [arena.reserve(f"part{i}", 16 * EXTENT) for i in range(4)]
    whole = arena.reserve("whole", 64 * EXTENT)
    for round_ in range(20):
        for piece in range(0, 16, 2):
            for span in parts:
                arena.map(span, piece, 2)
        for span in parts[round_ % 4 :] + parts[: round_ % 4]:
            arena.unmap(span, 0, 16)
        arena.map(whole, 0, 64)
        assert runs(whole.physical) == [(0, 64)]
        with open("/proc/self/maps") as maps:
            assert sum(int(line.split("-")[0], 16) in range(whole.address, whole.address + 64 * EXTENT)
                       for line in maps) == 1  # fmt: skip
        arena.unmap(whole, 0, 64)
    arena.close()


def test_the_integrity_check_notices_damaged_books() -> None:
    arena = CpuPageArena(4, EXTENT)
    span = arena.reserve("range", 4 * EXTENT)
    arena.map(span, 0, 2)
    span.physical[1] = span.physical[0]
    with pytest.raises(IntegrityError, match="mapped twice"):
        arena.check_integrity()
    span.physical[1] = UNMAPPED
    with pytest.raises(IntegrityError, match="do not make up 4"):
        arena.check_integrity()
    arena.close()


@pytest.mark.parametrize("first, count", [(-1, 2), (0, -1), (3, 2), (4, 1), (0, 5)])
def test_pieces_outside_the_range_are_refused(first: int, count: int) -> None:
    arena = CpuPageArena(8, EXTENT)
    span = arena.reserve("range", 4 * EXTENT)
    with pytest.raises(IntegrityError, match="cannot be mapped"):
        arena.map(span, first, count)
    arena.map(span, 0, 4)
    with pytest.raises(IntegrityError, match="not all mapped"):
        arena.unmap(span, first, count)
    arena.check_integrity()
    assert (arena.free_extents, span.mapped) == (4, 4)
    arena.close()


def test_touching_an_address_without_memory_ends_the_process_instead_of_reading_anothers_data() -> None:
    script = (
        "import torch\n"
        "from morph_runtime.memory.cpu import CpuPageArena\n"
        f"arena = CpuPageArena(2, {EXTENT})\n"
        f"span = arena.reserve('range', 2 * {EXTENT})\n"
        "arena.map(span, 0, 1)\n"
        f"view = arena.tensor(span, 0, (2 * {EXTENT},), torch.uint8)\n"
        "view[0] = 1\n"
        f"view[{EXTENT}] = 1\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, cwd=os.getcwd())
    assert ended.returncode == -11


def test_a_budget_beyond_the_machine_names_the_field_and_the_limit() -> None:
    extents = available_bytes() // EXTENT * 2
    with pytest.raises(ConfigError, match=r"memory\.budget_gib needs .* GiB, but this machine has .* GiB free"):
        CpuPageArena(extents, EXTENT)


def test_an_extent_must_be_whole_pages() -> None:
    with pytest.raises(ValueError, match="whole pages"):
        CpuPageArena(1, mmap.PAGESIZE + 1)


def test_a_view_outside_its_range_is_refused() -> None:
    arena = CpuPageArena(1, EXTENT)
    span = arena.reserve("range", EXTENT)
    with pytest.raises(ValueError, match="outside the range"):
        arena.tensor(span, 8, (EXTENT,), torch.uint8)
    with pytest.raises(ValueError, match="cannot reserve"):
        arena.reserve("range", EXTENT)
    arena.close()


def test_consecutive_extents_become_one_run() -> None:
    assert runs([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 1), (7, 2)]
    assert runs([]) == []
