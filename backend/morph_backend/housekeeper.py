"""A thread that does small duties on a timer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence


class Housekeeper:
    """Calls each duty every `interval_s` seconds, less often if they take long; one that raises is logged."""

    def __init__(self, interval_s: float, duties: Sequence[Callable[[], None]]) -> None:
        self._interval_s = interval_s
        self._duties = tuple(duties)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        pause = self._interval_s
        while not self._stop.wait(pause):
            began = time.monotonic()
            for duty in self._duties:
                try:
                    duty()
                except Exception:
                    logging.getLogger(__name__).exception("a duty has failed")
            pause = max(self._interval_s, time.monotonic() - began)
