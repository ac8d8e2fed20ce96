"""Two duties of the housekeeper: drain when the launcher asks, and end when the server has died."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from morph_backend.control import ControlFolder
from morph_backend.service import SHUTTING_DOWN, Service
from morph_backend.worker import Worker


class DrainDuty:
    """Once a drain is asked for: refuse new requests, let the open ones end, cut them off at the deadline."""

    def __init__(
        self,
        service: Service,
        control: ControlFolder,
        clock: Callable[[], float] = time.monotonic,
        undrained: Callable[[], int] = lambda: 0,
    ) -> None:
        """`undrained`: other processes of the model that may have open requests; each of them drains by itself."""
        self._service = service
        self._control = control
        self._clock = clock
        self._undrained = undrained
        self._deadline: float | None = None
        self._told = False

    def __call__(self) -> None:
        """One look."""
        if self._deadline is None:
            seconds = self._control.drain_asked()
            if seconds is None:
                return
            self._deadline = self._clock() + seconds
            self._service.refuse(SHUTTING_DOWN)
        if self._service.num_open and self._clock() >= self._deadline:
            self._service.abort(SHUTTING_DOWN)
        if not self._told and not self._service.num_open and not self._undrained():
            self._told = True
            self._control.say("drained")


class ParentWatch(Worker):
    """Ends this process when the server that started it is gone; Triton 2.51 leaves it behind otherwise.

    A thread of its own that calls nothing of Triton's: what waits for a dead server (a question whether a client is
    there, a response) waits for ever, with the locks that it holds. So nothing is closed in order either: the engine
    ends when its socket closes, and the files are swept by the launcher, or at the next start. Where such a call holds
    the interpreter's lock, this thread does not run either: then the engine ends this process (`engine.orphan`).
    """

    def __init__(self, leave: Callable[[int], object] = os._exit, interval_s: float = 0.2) -> None:
        """To be made before anything that takes long: the server may die meanwhile."""
        super().__init__("parent-watch", interval_s)
        self.parent = os.getppid()
        self._leave = leave

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            if os.getppid() != self.parent:
                self._leave(1)
                return
