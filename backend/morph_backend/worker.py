"""The thread that the backend's timed duties run on: started once, stopped by an event, joined for a while.

A thread that dies of an exception takes its duty with it, and nobody notices: so none does.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable


class Worker(ABC):
    """One daemon thread. `_run` waits on `_stop` between its rounds and returns once it is set."""

    def __init__(self, name: str, interval_s: float, on_defect: Callable[[str], None] = lambda _thread: None) -> None:
        """`name` is the thread's; `interval_s` the pause between rounds, seconds; `on_defect` hears of exceptions."""
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._on_defect = on_defect

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread; waits for its last round, `timeout_s` seconds at most."""
        self._stop.set()
        self._thread.join(timeout_s)

    @abstractmethod
    def _run(self) -> None:
        """The thread's life; if it raises, it begins anew after a pause."""

    def _defect(self) -> None:
        """Count an exception that has just been logged."""
        self._on_defect(self._thread.name)

    def _live(self) -> None:
        while True:
            try:
                self._run()
                return
            except Exception:
                logging.getLogger(__name__).exception("the thread %s begins anew", self._thread.name)
                self._defect()
            if self._stop.wait(max(self._interval_s, 0.05)):
                return
