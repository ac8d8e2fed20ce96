"""Extents on their way: what the arena's books say already, and a thread may still have to tell the system.

The owner of the books orders moves, one thread does them in the order in which they were ordered. So an extent
that a move takes from one place is there for any move that is ordered later. A mapping that the system refuses
touches no other move. If it refuses to take an extent away, whoever is next to have it must not: all moves behind
are refused too, until the owner has seen it and put its books back, the last move first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future

from morph_runtime.memory.fence import Fence


class Move(Fence):
    """One run of a range's pieces that gets memory or loses it. Its owner asks; another thread may do it."""

    def __init__(self, work: Callable[[], None], undo: Callable[[], None], gives: bool) -> None:
        """`work`: does it; `undo`: puts the books back; `gives`: memory comes, else it is taken away."""
        self.work = work
        self.gives = gives
        self.job: Future[None] | None = None
        """None: done by the call that ordered it."""
        self._undo: Callable[[], None] | None = undo

    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self.job is None or self.job.done()

    def wait(self) -> None:
        """Wait until it is over, well or not."""
        if self.job is not None:
            self.job.exception()

    @property
    def failed(self) -> bool:
        """Whether it is over and the system has refused it."""
        return self.job is not None and self.job.done() and self.job.exception() is not None

    @property
    def is_settled(self) -> bool:
        """Over, and the books say what came of it."""
        return self.done() and (self._undo is None or not self.failed)

    def failure(self) -> BaseException | None:
        """Wait; why the system refused, None if it did not. The books are as if the move had not been ordered, then."""
        reason = None if self.job is None else self.job.exception()
        if reason is not None:
            self.undo()
        return reason

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


class MoveLine:
    """Moves in the order in which they were ordered; all calls but `_do` come from the owner of the books."""

    def __init__(self, worker: Executor, wake: Callable[[], None]) -> None:
        """`worker`: one thread; `wake`: called by it after every move."""
        self._worker = worker
        self._wake = wake
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
        move.job = self._worker.submit(self._do, move)
        self._under_way.append(move)
        move.job.add_done_callback(lambda _: self._wake())

    def check(self) -> None:
        """See what has come of the moves; never waits unless one has failed.

        Raises:
            OSError: an extent could not be taken away, or not be taken back from half a mapping; the books are as if
                that move and all behind it had not been ordered.
        """
        self._forget()
        if self._broken is not None:
            self.wait()
            self.put_back()
            reason, self._broken = self._broken, None
            raise reason

    def wait(self) -> None:
        """Wait until all moves are over, well or not."""
        for move in self._under_way:
            move.wait()

    def put_back(self) -> None:
        """Put the books back for all that have failed, the last first; all moves are over."""
        for move in reversed(self._under_way):
            if move.failed:
                move.undo()
        self._under_way.clear()

    def close(self) -> None:
        """Let the moves under way end, then the thread; the books say what came of them."""
        self.wait()
        self.put_back()
        self._worker.shutdown(wait=True)

    def _do(self, move: Move) -> None:
        """In the worker."""
        if self._broken is not None:
            raise self._broken
        try:
            move.work()
        except BaseException as reason:
            if not move.gives:
                self._broken = reason
            elif not isinstance(reason, OSError):
                move.keep()
                self._broken = reason
            raise

    def _forget(self) -> None:
        while self._under_way and self._under_way[0].is_settled:
            self._under_way.popleft()
