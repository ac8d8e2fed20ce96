"""Ends a serving process whose server has died and that cannot end by itself.

The serving process is a child of the server (Triton's stub is one of tritonserver). When the server dies, a call into
it may wait for ever, and some of Triton's do so with the interpreter's lock held (the creation of a metric, in 2.51):
then no thread of the serving process runs any more, not even the one that would end it, and the engine would keep its
GPU for nobody. So the engine looks from outside.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path

PATIENCE_S = 5.0
"""For the serving process to notice by itself."""
INTERVAL_S = 1.0


class OrphanGuard:
    """Looks at our parent's parent. `start` it once; its thread ends with the process."""

    def __init__(self, server: int, *, patience_s: float = PATIENCE_S, interval_s: float = INTERVAL_S) -> None:
        """`server` is the process id of our parent's parent, as our parent has seen it."""
        self._server = server
        self._serving = os.getppid()
        self._patience_s, self._interval_s = patience_s, interval_s
        self._never = threading.Event()

    def start(self) -> None:
        """Look from now on, in a thread."""
        threading.Thread(target=self.run, name="orphan-guard", daemon=True).start()

    def run(self) -> None:
        """Look until the serving process is gone, or has to be ended."""
        while os.getppid() == self._serving:
            if parent_of(self._serving) != self._server:
                self._never.wait(self._patience_s)
                if os.getppid() == self._serving:  # it is still our parent, so this number is no one else's
                    logging.getLogger(__name__).error("the server has died; its process %d is ended", self._serving)
                    os.kill(self._serving, signal.SIGKILL)
                return
            self._never.wait(self._interval_s)


def parent_of(pid: int) -> int:
    """The parent of a process, from /proc; 0 if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # behind the name, which may hold anything, and the state
