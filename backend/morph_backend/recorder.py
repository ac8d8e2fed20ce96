"""Where every thread leaves its metric changes; the exporter thread alone takes them to Triton.

Metric calls from several threads crash Triton, so no other thread may make them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

Labels = tuple[tuple[str, str], ...]
CounterKey = tuple[str, Labels]
"""A metric's name and its labels."""


@dataclass
class Changes:
    """What has changed since the last take; keys are a metric's name and its labels."""

    counts: dict[CounterKey, float] = field(default_factory=dict)
    gauges: dict[CounterKey, float] = field(default_factory=dict)
    observations: dict[str, list[float]] = field(default_factory=dict)


class MetricsRecorder:
    """Collects changes. Safe to use from several threads; cheap."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._lock = threading.Lock()
        self._changes = Changes()
        self._totals: dict[CounterKey, float] = {}

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        self.count_all([((name, _labels(labels)), value)])

    def count_all(self, values: Iterable[tuple[CounterKey, float]]) -> None:
        """Add to several counters in one turn of the lock."""
        if self._enabled:
            with self._lock:
                counts = self._changes.counts
                for key, value in values:
                    if value > 0:
                        counts[key] = counts.get(key, 0.0) + value

    def declare(self, name: str, **labels: str) -> None:
        """Make a counter appear with 0 before it first counts."""
        if self._enabled:
            with self._lock:
                self._changes.counts.setdefault((name, _labels(labels)), 0.0)

    def total(self, name: str, value: float, **labels: str) -> None:
        """Bring a counter to a total that someone else keeps; a smaller one than before is a restart from 0."""
        if not self._enabled:
            return
        key = (name, _labels(labels))
        with self._lock:
            before = self._totals.get(key, 0.0)
            self._totals[key] = value
            self._changes.counts.setdefault(key, 0.0)
        self.count(name, value - before if value >= before else value, **labels)

    def restart_totals(self) -> None:
        """Who keeps the totals counts from 0 again, also what it does not mention at once."""
        with self._lock:
            self._totals.clear()

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        if self._enabled:
            with self._lock:
                self._changes.gauges[name, _labels(labels)] = value

    def observe(self, name: str, *values: float) -> None:
        """Add to a histogram."""
        if self._enabled and values:
            with self._lock:
                self._changes.observations.setdefault(name, []).extend(values)

    def take(self) -> Changes:
        """The changes since the last call."""
        with self._lock:
            taken, self._changes = self._changes, Changes()
            return taken


def counter_key(name: str, **labels: str) -> CounterKey:
    """A counter for `MetricsRecorder.count_all`."""
    return name, _labels(labels)


def _labels(labels: dict[str, str]) -> Labels:
    return tuple(sorted(labels.items()))
