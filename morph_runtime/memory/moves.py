"""Extents on their way: what the arena's books say already, and a thread may still have to tell the system.

The owner of the books orders moves, one thread does them in the order in which they were ordered. So an extent
that a move takes from one place is there for any move that is ordered later. A mapping that the system refuses
touches no other move. If it refuses to take an extent away, whoever is next to have it must not: all moves behind
are refused too, until the owner has seen it and put its books back, the last move first.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from morph_runtime.memory.fence import DoneFence, Fence


class Move(Fence):
    """One run of a range's pieces that gets memory or loses it. Its owner asks; another thread may do it."""

    def __init__(self, work: Callable[[], None], undo: Callable[[], None], gives: bool) -> None:
        """`work`: does it; `undo`: puts the books back; `gives`: memory comes, else it is taken away."""
        self.work = work
        self.gives = gives
        self.over: Fence = DoneFence()
        self.refusal: BaseException | None = None
        """Why the system refused; valid when it is over."""
        self._undo: Callable[[], None] | None = undo

    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self.over.done()

    def wait(self) -> None:
        """Wait until it is over, well or not."""
        self.over.wait()

    @property
    def failed(self) -> bool:
        """Whether it is over and the system has refused it."""
        return self.over.done() and self.refusal is not None

    @property
    def is_settled(self) -> bool:
        """Over, and the books say what came of it."""
        return self.over.done() and (self._undo is None or self.refusal is None)

    def failure(self) -> BaseException | None:
        """Wait; why the system refused, None if it did not. The books are as if the move had not been ordered, then."""
        self.over.wait()
        if self.refusal is not None:
            self.undo()
        return self.refusal

    def finish(self) -> None:
        """Wait until it is done.

        Raises:
            OSError: the system refused; the books are as if the move had not been ordered.
        """
        reason = self.failure()
        if reason is not None:
            raise reason

    def undo(self) -> None:
        """Put the books back, once."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def keep(self) -> None:
        """Leave the books as they are, though it has failed: some of it may be done."""
        self._undo = None


class MoveWorker(ABC):
    """Does one thing after the other, in the order in which it is told."""

    @abstractmethod
    def put(self, work: Callable[[], None]) -> Fence:
        """Have this done behind all else; it raises nothing."""

    @abstractmethod
    def close(self) -> None:
        """Wait for all that was put; nothing is put any more."""


class ThreadWorker(MoveWorker):
    """A thread. The step loop tells it, so that must be cheap: an executor and its futures take three times as long."""

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        """`wake`: called by it whenever something is done."""
        self._wake = wake
        self._line: SimpleQueue[tuple[Callable[[], None], Latch] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> Fence:
        """See `MoveWorker.put`."""
        latch = Latch()
        self._line.put((work, latch))
        return latch

    def close(self) -> None:
        """See `MoveWorker.close`."""
        self._line.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (told := self._line.get()) is not None:
            work, latch = told
            work()
            latch.open()
            self._wake()


class Latch(Fence):
    """Opened once, by another thread."""

    def __init__(self) -> None:
        self._closed = threading.Lock()
        self._closed.acquire()

    def done(self) -> bool:
        """See `Fence.done`."""
        return not self._closed.locked()

    def wait(self) -> None:
        """See `Fence.wait`; for one thread."""
        if self._closed.locked():
            self._closed.acquire()
            self._closed.release()

    def open(self) -> None:
        """It is done."""
        self._closed.release()


class MoveLine:
    """Moves in the order in which they were ordered; all calls but `_do` come from the owner of the books."""

    def __init__(self, worker: MoveWorker) -> None:
        self._worker = worker
        self._under_way: deque[Move] = deque()
        self._broken: BaseException | None = None

    @property
    def is_settled(self) -> bool:
        """No move is under way, and none has failed that its owner has not seen."""
        self._forget()
        return not self._under_way

    def order(self, move: Move) -> None:
        """Have it done behind all others."""
        self._forget()
        self._under_way.append(move)
        move.over = self._worker.put(partial(self._do, move))

    def check(self) -> None:
        """See what has come of the moves; never waits unless one has failed.

        Raises:
            OSError: an extent could not be taken away, or not be taken back from half a mapping; the books are as if
                that move and all behind it had not been ordered.
        """
        self._forget()
        if self._broken is not None:
            self.wait()
            self._put_back()
            reason, self._broken = self._broken, None
            raise reason

    def wait(self) -> None:
        """Wait until all moves are over, well or not."""
        for move in self._under_way:
            move.wait()

    def close(self) -> None:
        """Let the moves under way end, then the worker; the books say what came of them."""
        self._worker.close()
        self._put_back()

    def _put_back(self) -> None:
        """Put the books back for all that have failed, the last first; all moves are over."""
        for move in reversed(self._under_way):
            if move.failed:
                move.undo()
        self._under_way.clear()

    def _do(self, move: Move) -> None:
        """In the worker. What it writes is read by others once the move is over."""
        move.refusal = self._broken
        if self._broken is None:
            try:
                move.work()
            except Exception as reason:  # noqa: BLE001 - the owner raises it, in its own thread
                move.refusal = reason
                if not move.gives:
                    self._broken = reason
                elif not isinstance(reason, OSError):
                    move.keep()
                    self._broken = reason

    def _forget(self) -> None:
        while self._under_way and self._under_way[0].is_settled:
            self._under_way.popleft()
