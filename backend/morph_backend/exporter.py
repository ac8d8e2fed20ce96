"""The one thread that calls Triton's metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from morph_backend.metric_catalog import COUNTER, GAUGE, HISTOGRAM, MetricSpec
from morph_backend.recorder import Changes, Labels, MetricsRecorder
from morph_backend.worker import Worker

MOST_OBSERVED = 100
"""Values of one histogram in one export. Triton takes them one by one, each by a message to its own process and back: a
value for every token would keep this thread, and the senders beside it, busy with nothing else."""


def sample(values: Sequence[float], most: int) -> Sequence[float]:
    """At most `most` values that stand for all: in order of size, the middle one of each of `most` equal parts."""
    if len(values) <= most:
        return values
    ordered = sorted(values)
    return [ordered[int((part + 0.5) * len(ordered) / most)] for part in range(most)]


class MetricsExporter(Worker):
    """Hands the recorder's changes to Triton every `interval_s` seconds; what is left, when it is closed.

    A server that runs without metrics is tolerated: the changes are thrown away then.
    """

    def __init__(
        self,
        recorder: MetricsRecorder,
        catalog: Mapping[str, MetricSpec],
        labels: Mapping[str, str],
        interval_s: float,
        before: Callable[[], None],
        on_defect: Callable[[str], None] = lambda _thread: None,
    ) -> None:
        """`labels` go on every metric; `before` is called ahead of each export and may set gauges."""
        super().__init__("metrics", interval_s, on_defect)
        self._recorder = recorder
        self._catalog = catalog
        self._labels = dict(labels)
        self._before = before
        self._families: dict[str, Any] = {}  # must live as long as their metrics
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._available = True
        self._complained: set[str] = set()  # metrics whose failure has been logged

    def _run(self) -> None:
        self._create_families()
        last = False
        while True:
            try:
                self._before()
                self._export(self._recorder.take())
            except Exception:
                logging.getLogger(__name__).exception("metrics could not be exported")
                self._defect()
            if last:
                break
            last = self._stop.wait(self._interval_s)
        self._metrics.clear()
        self._families.clear()

    def _create_families(self) -> None:
        kinds = {
            COUNTER: pb_utils.MetricFamily.COUNTER,
            GAUGE: pb_utils.MetricFamily.GAUGE,
            HISTOGRAM: getattr(pb_utils.MetricFamily, "HISTOGRAM", None),
        }
        try:
            for name, spec in self._catalog.items():
                if kinds[spec.kind] is not None:
                    self._families[name] = pb_utils.MetricFamily(
                        name=name, description=spec.description, kind=kinds[spec.kind]
                    )
        except Exception as error:  # noqa: BLE001 - Triton runs with --allow-metrics=false
            self._available = False
            logging.getLogger(__name__).warning("metrics are not exported: %s", error)

    def _export(self, changes: Changes) -> None:
        if not self._available:
            return
        for (name, labels), value in changes.counts.items():
            self._call(name, labels, "increment", value)
        for (name, labels), value in changes.gauges.items():
            self._call(name, labels, "set", value)
        for name, values in changes.observations.items():
            for value in sample(values, MOST_OBSERVED):
                self._call(name, (), "observe", value)

    def _call(self, name: str, labels: Labels, method: str, value: float) -> None:
        try:
            self._apply(name, labels, method, value)
        except Exception as error:  # noqa: BLE001 - one bad metric must not cost the rest of the batch
            if name not in self._complained:
                self._complained.add(name)
                logging.getLogger(__name__).warning("the metric %s could not be exported: %s", name, error)

    def _apply(self, name: str, labels: Labels, method: str, value: float) -> None:
        metric = self._metrics.get((name, labels))
        if metric is None:
            family = self._families.get(name)
            if family is None:
                return
            buckets = {"buckets": list(self._catalog[name].buckets)} if self._catalog[name].kind == HISTOGRAM else {}
            metric = family.Metric(labels={**self._labels, **dict(labels)}, **buckets)
            self._metrics[name, labels] = metric
        getattr(metric, method)(value)
