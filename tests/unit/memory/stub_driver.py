"""A driver whose work is done by hand: what the arena's worker has been told lies in a line until somebody steps it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from morph_runtime.memory.arena import UNMAPPED, PageArena, VirtualRange
from morph_runtime.memory.moves import MoveLine


class HandFuture(Future[Any]):
    """Waiting for it has the worker do it."""

    def __init__(self, worker: HandWorker) -> None:
        super().__init__()
        self._worker = worker

    def result(self, timeout: float | None = None) -> Any:
        self._worker.step_to(self)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._worker.step_to(self)
        return super().exception(timeout)


class HandWorker(Executor):
    """One thread's place; the calling thread does one job after the other, when told to or when it waits for one."""

    def __init__(self) -> None:
        self.line: deque[tuple[HandFuture, Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> HandFuture:
        future = HandFuture(self)
        self.line.append((future, lambda: fn(*args, **kwargs)))
        return future

    def step(self, count: int | None = None) -> None:
        """Do some jobs, or all."""
        for _ in range(len(self.line) if count is None else min(count, len(self.line))):
            future, work = self.line.popleft()
            try:
                result = work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def step_to(self, future: HandFuture) -> None:
        while not future.done():
            self.step(1)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        assert not self.line


class StubDriver:
    """Stands between an arena and the system: knows what is behind each address in truth, and may refuse calls."""

    def __init__(self, arena: PageArena, worker: Executor) -> None:
        self._arena = arena
        self.behind: dict[int, int] = {
            span.address + piece * arena.extent_bytes: extent
            for span in arena.ranges.values()
            for piece, extent in enumerate(span.physical)
            if extent != UNMAPPED
        }
        self.refuse_map_in = self.refuse_unmap_in = 0
        """Refuse the n-th such call from now; 0: none."""
        self.refused = 0
        self._system_map, self._system_unmap = arena._map, arena._unmap
        arena._map, arena._unmap = self._map, self._unmap  # type: ignore[method-assign]
        arena._line = MoveLine(worker, lambda: arena.on_move())

    def has(self, span: VirtualRange, pieces: range) -> bool:
        """Whether all these pieces have memory in truth, that of the books."""
        size = self._arena.extent_bytes
        return all(self.behind.get(span.address + piece * size) == span.physical[piece] for piece in pieces)

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
        if self.refuse_map_in == 0:
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
        self._system_unmap(address, nbytes)
        for at in range(address, address + nbytes, self._arena.extent_bytes):
            del self.behind[at]
