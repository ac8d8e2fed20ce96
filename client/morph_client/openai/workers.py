"""Several processes that answer from one listening socket: one Python process forwards tokens with one core alone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

from morph_client.errors import ServerError

SHORTEST_LIFE_S = 5.0


class Workers:
    """Starts ``count`` copies of this process, each of which calls ``work`` until it gets a SIGTERM.

    They are forked, so nothing that has threads or connections may be there before :meth:`run`. One that ends by
    itself is replaced. They end with this process, however it ends.
    """

    def __init__(self, work: Callable[[], None], count: int, shortest_life_s: float = SHORTEST_LIFE_S) -> None:
        """A worker that ends sooner than ``shortest_life_s`` would end again and again: it ends all."""
        self._shortest_life_s = shortest_life_s
        self._work = work
        self._count = count
        self._started: dict[int, float] = {}  # process id -> monotonic seconds
        self._ending = False
        self._alive, self._watched = os.pipe()  # end of file at the reading end: this process is gone

    def run(self) -> None:
        """Returns when SIGINT or SIGTERM has ended them all.

        Raises:
            ServerError: a worker has ended right after its start.
        """
        before = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for _ in range(self._count):
                self._start()
            self._watch()
        finally:
            self._stop_all()
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._alive)
            os.close(self._watched)

    def _watch(self) -> None:
        failed = ""
        while self._started:
            pid, status = os.wait()
            if pid not in self._started:
                continue
            age_s = time.monotonic() - self._started.pop(pid)
            if self._ending:
                continue
            what = _ended(os.waitstatus_to_exitcode(status))
            if age_s < self._shortest_life_s:
                failed = failed or f"a worker {what} right after its start"
                self._ending = True
                self._stop_all()
            else:
                print(f"morph: a worker {what}; another one takes its place", file=sys.stderr, flush=True)
                self._start()
        if failed:
            raise ServerError(failed)

    def _start(self) -> None:
        pid = os.fork()
        if pid == 0:
            self._child()
        self._started[pid] = time.monotonic()
        if self._ending:  # the signal came between the two
            os.kill(pid, signal.SIGTERM)

    def _child(self) -> None:
        status = 1
        try:
            os.close(self._watched)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            threading.Thread(target=self._end_with_parent, name="parent-watch", daemon=True).start()
            self._work()
            status = 0
        except BaseException:  # noqa: BLE001 - nothing of the parent's way out may run in here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _end_with_parent(self) -> None:
        os.read(self._alive, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self._ending = True
        self._stop_all()

    def _stop_all(self) -> None:
        for pid in list(self._started):
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGTERM)


def default_count() -> int:
    """One for every four processors, at most four: the server beside it needs the others."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, count // 4))


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
