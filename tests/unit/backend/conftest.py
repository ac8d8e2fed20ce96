"""Triton's Python module exists only inside Triton's stub; here a stand-in of the parts that are used."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any, ClassVar

import numpy as np
import pytest


class TritonError(Exception):
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "INTERNAL", "INVALID_ARG", "UNAVAILABLE", "CANCELLED"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


class Tensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.error = error
        self.outputs = {t.name(): t.as_numpy() for t in output_tensors}


class Metric:
    def __init__(self, family: MetricFamily, labels: dict[str, str], buckets: list[float]) -> None:
        self.family, self.labels, self.buckets, self.value = family, labels, buckets, 0.0
        self.values: list[float] = []

    def increment(self, value: float) -> None:
        self.family.seen()
        self.value += value

    def set(self, value: float) -> None:
        self.family.seen()
        self.value = value

    def observe(self, value: float) -> None:
        self.family.seen()
        self.values.append(value)


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    made: ClassVar[list[MetricFamily]] = []
    threads: ClassVar[set[str]] = set()
    fail = False

    def __init__(self, name: str, description: str, kind: str) -> None:
        if MetricFamily.fail:
            raise TritonModelException("metrics are off")
        self.name, self.kind, self.metrics = name, kind, []
        self.seen()
        MetricFamily.made.append(self)

    def seen(self) -> None:
        MetricFamily.threads.add(threading.current_thread().name)

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:
        self.seen()
        metric = Metric(self, labels, buckets or [])
        self.metrics.append(metric)
        return metric


class TritonModelException(Exception):
    pass


def _module() -> types.ModuleType:
    module = types.ModuleType("triton_python_backend_utils")
    parts = (TritonError, Tensor, InferenceResponse, MetricFamily, TritonModelException)
    for part in parts:
        setattr(module, part.__name__, part)
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    return module


sys.modules.setdefault("triton_python_backend_utils", _module())


class Sender:
    """Triton's response sender, with its rules: no send and no poll after FINAL."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.finals = 0
        self.cancelled = False
        self.broken = False
        self.broken_final = False
        self.done = threading.Event()
        self.misuse: list[str] = []

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self.finals:
            self.misuse.append("send after FINAL")
        if (self.broken and not flags) or (self.broken_final and response is not None and flags):
            raise RuntimeError("cannot send")
        if response is not None:
            self.responses.append(response)
        if flags:
            self.finals += 1
            self.done.set()

    def is_cancelled(self) -> bool:
        if self.finals:
            self.misuse.append("is_cancelled after FINAL")
        return self.cancelled

    @property
    def error(self) -> TritonError | None:
        return self.responses[-1].error if self.responses else None

    @property
    def text(self) -> str:
        return "".join(r.outputs["text_output"][0].decode() for r in self.responses if r.error is None)


class Request:
    def __init__(self, parameters: str = "", **inputs: Any) -> None:
        self._parameters = parameters
        self._inputs = [Tensor(name, self._array(value)) for name, value in inputs.items()]

    @staticmethod
    def _array(value: Any) -> np.ndarray[Any, Any]:
        if isinstance(value, np.ndarray):
            return value
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, (str, bytes)) for v in values):
            return np.array([v if isinstance(v, bytes) else v.encode() for v in values], dtype=np.object_)
        return np.array(values)

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return self._parameters


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest.fixture
def make_sender() -> type[Sender]:
    return Sender


@pytest.fixture
def make_request() -> type[Request]:
    return Request


@pytest.fixture
def metric_families() -> Any:
    MetricFamily.made, MetricFamily.threads, MetricFamily.fail = [], set(), False
    yield MetricFamily
    MetricFamily.fail = False
