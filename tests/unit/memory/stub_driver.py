"""A driver whose work is done by hand: what the arena's worker has been told lies in a line until somebody steps it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from morph_runtime.memory.arena import UNMAPPED, PageArena, VirtualRange
from morph_runtime.memory.fence import Fence
from morph_runtime.memory.moves import MoveLine, MoveWorker


class HandWorker(MoveWorker):
    """The calling thread does one thing after the other, when told to or when it waits for one."""

    def __init__(self) -> None:
        self.line: deque[tuple[Callable[[], None], HandFence]] = deque()

    def put(self, work: Callable[[], None]) -> Fence:
        fence = HandFence(self)
        self.line.append((work, fence))
        return fence

    def step(self, count: int | None = None) -> None:
        """Do some, or all."""
        for _ in range(len(self.line) if count is None else min(count, len(self.line))):
            work, fence = self.line.popleft()
            work()
            fence.passed = True

    def close(self) -> None:
        self.step()


class HandFence(Fence):
    def __init__(self, worker: HandWorker) -> None:
        self._worker = worker
        self.passed = False

    def done(self) -> bool:
        return self.passed

    def wait(self) -> None:
        while not self.passed:
            self._worker.step(1)


class StubDriver:
    """Stands between an arena and the system: knows what is behind each address in truth, and may refuse calls."""

    def __init__(self, arena: PageArena, worker: MoveWorker) -> None:
        self._arena = arena
        self.behind: dict[int, int] = {
            span.address + piece * arena.extent_bytes: extent
            for span in arena.ranges.values()
            for piece, extent in enumerate(span.physical)
            if extent != UNMAPPED
        }
        self.refuse_map_in = self.refuse_unmap_in = 0
        """Refuse the n-th such call from now; 0: none."""
        self.refuses_maps = False
        """Refuse every such call."""
        self.refused = 0
        self.in_use: Callable[[], set[int]] = set
        """Addresses of pieces that the device may still touch."""
        self._system_map, self._system_unmap = arena._map, arena._unmap
        arena._map, arena._unmap = self._map, self._unmap  # type: ignore[method-assign]
        arena._line = MoveLine(worker)

    def has(self, span: VirtualRange, pieces: range) -> bool:
        """Whether all these pieces have memory in truth, that of the books."""
        size = self._arena.extent_bytes
        return all(self.behind.get(span.address + piece * size) == span.physical[piece] for piece in pieces)

    def addresses(self, span: VirtualRange, pieces: range) -> set[int]:
        """Of these pieces."""
        return {span.address + piece * self._arena.extent_bytes for piece in pieces}

    def check(self) -> None:
        """No extent is behind two addresses, in truth."""
        assert len(set(self.behind.values())) == len(self.behind)

    def agrees(self) -> bool:
        """Whether the books say what is true."""
        size, booked = self._arena.extent_bytes, {}
        for span in self._arena.ranges.values():
            booked.update({span.address + p * size: e for p, e in enumerate(span.physical) if e != UNMAPPED})
        return booked == self.behind

    def _map(self, address: int, extent: int, count: int) -> None:
        self.refuse_map_in -= 1
        if self.refuse_map_in == 0 or self.refuses_maps:
            self.refused += 1
            raise OSError(12, "no mapping to be had")
        self._system_map(address, extent, count)
        for at in range(count):
            assert address + at * self._arena.extent_bytes not in self.behind
            assert extent + at not in self.behind.values(), "an extent comes before it has left"
            self.behind[address + at * self._arena.extent_bytes] = extent + at

    def _unmap(self, address: int, nbytes: int) -> None:
        self.refuse_unmap_in -= 1
        if self.refuse_unmap_in == 0:
            self.refused += 1
            raise OSError(5, "no memory to be had back")
        leaving = range(address, address + nbytes, self._arena.extent_bytes)
        assert self.in_use().isdisjoint(leaving), "taken away while the device may touch it"
        self._system_unmap(address, nbytes)
        for at in leaving:
            del self.behind[at]
