"""Triton's queue, read off Triton's own metrics endpoint: what the engine's controller is told of it."""

from __future__ import annotations

import contextlib
import http.client
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from morph_backend.metrics_page import MetricsPage
from morph_backend.worker import Worker
from morph_runtime.engine.messages import QueueSignal

PENDING = "nv_inference_pending_request_count"
QUEUE_US = "nv_inference_queue_duration_us"
SUCCESS = "nv_inference_request_success"
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class QueueReading:
    """The queue metrics of one model at one time.

    Attributes:
        taken_s: monotonic seconds.
        pending: requests in the queue.
        queue_us: microseconds spent in the queue by all requests that have left it.
        left: requests that have left it.
    """

    taken_s: float
    pending: int
    queue_us: float
    left: float


def parse_reading(text: str, model: str, version: str, now: float) -> QueueReading:
    """Find the model's queue metrics in Prometheus text; what is missing counts as 0."""
    found = dict.fromkeys((PENDING, QUEUE_US, SUCCESS), 0.0)
    for line in text.splitlines():
        name, brace, rest = line.partition("{")
        if not brace or name not in found:
            continue
        labels, _, value = rest.rpartition("} ")
        named = dict(_LABEL.findall(labels))
        if named.get("model") == model and named.get("version", version) == version:
            with contextlib.suppress(ValueError):
                found[name] += float(value.split()[0])
    return QueueReading(now, int(found[PENDING]), found[QUEUE_US], found[SUCCESS])


class BacklogProbe:
    """Answers how many requests stand in Triton's queue right now; for one thread."""

    def __init__(self, address: tuple[str, int], model: tuple[str, str]) -> None:
        """`address` is host and port of the metrics endpoint, `model` the model's name and version."""
        self._page = MetricsPage(address)
        self._model = model

    def __call__(self) -> int:
        """Their number; 1 if it cannot be known, for one may stand there."""
        try:
            return parse_reading(self._page.read(), *self._model, time.monotonic()).pending
        except (OSError, http.client.HTTPException):
            return 1

    def close(self) -> None:
        """Close the connection; the next call would connect anew."""
        self._page.close()


def make_signal(before: QueueReading | None, now: QueueReading, held: int, held_before: int = 0) -> QueueSignal:
    """The signal from two readings.

    Args:
        before: the reading before, or None.
        now: the present reading.
        held: requests held in `execute()`, which Triton counts as neither queued nor done.
        held_before: the same at the reading before.
    """
    pending = now.pending + held
    if before is None or now.taken_s <= before.taken_s:
        return QueueSignal(taken_s=now.taken_s, pending=pending)
    left = max(0.0, now.left - before.left)
    waited_s = max(0.0, now.queue_us - before.queue_us) / 1e6
    arrived = max(0.0, left + pending - before.pending - held_before)
    return QueueSignal(
        taken_s=now.taken_s,
        pending=pending,
        queue_time_s=waited_s / left if left else 0.0,
        arrivals_per_s=arrived / (now.taken_s - before.taken_s),
    )


class QueueWatch(Worker):
    """A thread that reads the endpoint and publishes a signal; unreachable, it publishes nothing."""

    def __init__(
        self,
        address: tuple[str, int],
        model: tuple[str, str],
        interval_s: float,
        held: Callable[[], int],
        publish: Callable[[QueueSignal], None],
        on_defect: Callable[[str], None] = lambda _thread: None,
    ) -> None:
        """`address` is host and port of the endpoint, `model` the model's name and version."""
        super().__init__("queue-watch", interval_s, on_defect)
        self._page = MetricsPage(address)
        self._model = model
        self._held = held
        self._publish = publish

    def _run(self) -> None:
        before: QueueReading | None = None
        held_before = 0
        warned = False
        reached = False
        while not self._stop.wait(self._interval_s):
            try:
                held = self._held()
                reading = parse_reading(self._page.read(), *self._model, time.monotonic())
                self._publish(make_signal(before, reading, held, held_before))
                before, held_before, reached = reading, held, True
            except Exception as error:  # noqa: BLE001 - a bad answer must not end the thread
                before = None
                self._page.close()
                # Triton opens the endpoint only after the model is loaded: being early is no fault.
                if reached and not warned:
                    warned = True
                    logging.getLogger(__name__).warning("Triton's queue metrics cannot be read: %s", error)
        self._page.close()
