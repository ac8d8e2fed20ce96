"""Sender threads: a request always stays with one of them, so its responses keep their order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from morph_backend.open_request import OpenRequest


class SenderPool:
    """`count` threads that call `work` for requests that have something new.

    Args:
        count: threads.
        work: called with the request; nothing new to send must be harmless.
        failed: called with the request and the error when `work` raises.
        on_defect: told the thread's name then.
    """

    def __init__(
        self,
        count: int,
        work: Callable[[OpenRequest], None],
        failed: Callable[[OpenRequest, Exception], None],
        on_defect: Callable[[str], None] = lambda _thread: None,
    ) -> None:
        self._work = work
        self._failed = failed
        self._on_defect = on_defect
        self._queues: list[SimpleQueue[OpenRequest | None]] = [SimpleQueue() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._run, args=(queue,), name=f"sender-{index}", daemon=True)
            for index, queue in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    def wake(self, request: OpenRequest) -> None:
        """Tell the request's thread that something is in its inbox; one call until it looks is enough."""
        if not request.awaited:
            request.awaited = True
            self._queues[request.key % len(self._queues)].put(request)

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is queued, then end the threads."""
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self, queue: SimpleQueue[OpenRequest | None]) -> None:
        while (request := queue.get()) is not None:
            request.awaited = False  # first: what comes from now on wakes the thread again
            try:
                self._work(request)
            except Exception as error:
                logging.getLogger(__name__).exception("a response could not be sent")
                self._on_defect(threading.current_thread().name)
                self._report(request, error)

    def _report(self, request: OpenRequest, error: Exception) -> None:
        """A failure to report a failure must not end the thread: it serves other requests too."""
        try:
            self._failed(request, error)
        except Exception:
            logging.getLogger(__name__).exception("a request could not be ended")
