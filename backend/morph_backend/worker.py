"""The thread that the backend's timed duties run on: started once, stopped by an event, joined for a while."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod


class Worker(ABC):
    """One daemon thread. `_run` waits on `_stop` between its rounds and returns once it is set."""

    def __init__(self, name: str, interval_s: float) -> None:
        """`name` is the thread's; `interval_s` the pause between rounds, seconds."""
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread; waits for its last round, `timeout_s` seconds at most."""
        self._stop.set()
        self._thread.join(timeout_s)

    @abstractmethod
    def _run(self) -> None:
        """The thread's life; must not raise."""
