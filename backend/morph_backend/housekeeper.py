"""A thread that does small duties on a timer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from morph_backend.worker import Worker


class Housekeeper(Worker):
    """Calls each duty every `interval_s` seconds, less often if they take long; one that raises is logged."""

    def __init__(
        self,
        interval_s: float,
        duties: Sequence[Callable[[], None]],
        on_defect: Callable[[str], None] = lambda _thread: None,
    ) -> None:
        super().__init__("housekeeper", interval_s, on_defect)
        self._duties = tuple(duties)

    def _run(self) -> None:
        pause = self._interval_s
        while not self._stop.wait(pause):
            began = time.monotonic()
            for duty in self._duties:
                try:
                    duty()
                except Exception:
                    logging.getLogger(__name__).exception("a duty has failed")
                    self._defect()
            pause = max(self._interval_s, time.monotonic() - began)
