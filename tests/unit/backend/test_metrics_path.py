from __future__ import annotations

import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_engine import FakeEngine
from morph_backend.engine_metrics import EngineMetrics
from morph_backend.exporter import MOST_OBSERVED, MetricsExporter, sample
from morph_backend.metric_catalog import catalog, one_two_five
from morph_backend.queue_watch import BacklogProbe, QueueReading, QueueWatch, make_signal, parse_reading
from morph_backend.recorder import MetricsRecorder
from morph_backend.rungs import RungShares
from morph_runtime.config import EngineConfig
from morph_runtime.engine.messages import EngineStats, QueueSignal


def test_shares_by_level() -> None:
    shares = RungShares(4, ["w8", "w4"])
    assert shares.of(0) == (1.0, 0.0, 0.0)
    assert shares.of(1) == (0.75, 0.25, 0.0)
    assert shares.of(4) == (0.0, 1.0, 0.0)
    assert shares.of(5) == (0.0, 0.75, 0.25)
    assert shares.of(8) == shares.of(99) == (0.0, 0.0, 1.0)
    assert RungShares(2, ["w4"]).of(1) == (0.5, 0.0, 0.5)
    assert shares.total([]) == (0.0, 0.0, 0.0)
    assert shares.total([0, 8, 4]) == (1.0, 1.0, 1.0)
    assert shares.total([1, 1, 1, 1]) == (3.0, 1.0, 0.0)


def test_the_recorder_gathers() -> None:
    recorder = MetricsRecorder()
    recorder.declare("c", a="1")
    for value in (5, 7, 3):
        recorder.total("t", value)
    recorder.count("c", 2, a="1")
    recorder.gauge("g", 1)
    recorder.gauge("g", 2)
    recorder.observe("h", 0.5)
    recorder.observe("h", 0.6)
    changes = recorder.take()
    assert changes.counts == {("c", (("a", "1"),)): 2, ("t", ()): 10}
    assert changes.gauges == {("g", ()): 2} and changes.observations == {"h": [0.5, 0.6]}
    assert recorder.take().counts == {}


def test_what_a_new_engine_counts_comes_on_top_of_what_the_old_one_has_counted() -> None:
    """Also where the new one says nothing of a counter until it is past the old one's."""
    recorder = MetricsRecorder()
    metrics = EngineMetrics(recorder)
    snapshot = FakeEngine(EngineConfig(), SimpleNamespace())._stats()  # type: ignore[arg-type]
    decisions = [{"down/kv_wait": 3}, {"hold/dwell": 1}, {"hold/dwell": 2, "down/kv_wait": 5}]
    told: Counter[str] = Counter()
    for at, counts in enumerate(decisions):
        if at == 1:
            metrics.up(False)
        metrics.stats(msgspec.structs.replace(snapshot, decision_counts=counts, preemptions=2))
        if at == 1:
            metrics.restarted()  # its first snapshot may come before that word
    for (name, labels), value in recorder.take().counts.items():
        told[dict(labels).get("reason", name)] += int(value)
    assert (told["kv_wait"], told["dwell"], told["morph_preemptions_total"]) == (3 + 5, 2, 2 + 2)


def test_a_disabled_recorder_keeps_nothing() -> None:
    recorder = MetricsRecorder(enabled=False)
    recorder.count("c")
    recorder.total("t", 5)
    recorder.gauge("g", 1)
    recorder.observe("h", 1)
    recorder.declare("d")
    changes = recorder.take()
    assert not (changes.counts or changes.gauges or changes.observations)


def exporter(recorder: MetricsRecorder) -> MetricsExporter:
    labels = {"model": "morph", "version": "1"}
    return MetricsExporter(recorder, catalog(1000), labels, 0.01, lambda: recorder.gauge("morph_execute_waiting", 1))


def test_one_thread_makes_every_metric_call(metric_families: Any) -> None:
    recorder = MetricsRecorder()
    running = exporter(recorder)
    running.start()
    threads = [threading.Thread(target=recorder.observe, args=("vllm:request_prompt_tokens", n)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.count("morph_requests_total", outcome="stop")
    recorder.gauge("no_such_metric", 1)
    running.close()
    assert metric_families.threads == {"metrics"}
    by_name = {family.name: family for family in metric_families.made}
    (histogram,) = by_name["vllm:request_prompt_tokens"].metrics
    assert sorted(histogram.values) == list(range(20)) and histogram.buckets == list(one_two_five(1000))
    (counter,) = by_name["morph_requests_total"].metrics
    assert counter.labels == {"model": "morph", "version": "1", "outcome": "stop"} and counter.value == 1


@given(st.lists(st.floats(0, 1e3), max_size=400), st.integers(1, 60))
def test_a_sample_stands_for_all_values(values: list[float], most: int) -> None:
    found = list(sample(values, most))
    if len(values) <= most:
        assert found == values
        return
    assert len(found) == most and found == sorted(found) and set(found) <= set(values)
    for quantile in (0.1, 0.5, 0.9):
        at = int(quantile * most)
        below = sum(value < found[at] for value in values), sum(value <= found[at] for value in values)
        assert below[0] <= (at + 1) * len(values) / most and below[1] >= at * len(values) / most


def test_a_value_for_every_token_does_not_cost_a_call_for_every_token(metric_families: Any) -> None:
    recorder = MetricsRecorder()
    running = exporter(recorder)
    recorder.observe("vllm:time_per_output_token_seconds", *(n / 1e4 for n in range(10_000)))
    recorder.gauge("morph_level", 3)
    running._create_families()
    running._export(recorder.take())
    by_name = {family.name: family for family in metric_families.made}
    (histogram,) = by_name["vllm:time_per_output_token_seconds"].metrics
    assert len(histogram.values) == MOST_OBSERVED
    assert sum(histogram.values) / MOST_OBSERVED == pytest.approx(0.5, abs=0.01)
    assert by_name["morph_level"].metrics[0].value == 3


def test_a_server_without_metrics_is_tolerated(metric_families: Any) -> None:
    metric_families.fail = True
    recorder = MetricsRecorder()
    running = exporter(recorder)
    running.start()
    recorder.count("morph_requests_total", outcome="stop")
    running.close()
    assert metric_families.made == []


def test_a_metric_that_raises_does_not_cost_the_others(
    metric_families: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = metric_families.Metric

    def refuse(family: Any, labels: dict[str, str], buckets: list[float] | None = None) -> Any:
        if family.name == "morph_level":
            raise RuntimeError("no such thing")
        return make(family, labels, buckets)

    monkeypatch.setattr(metric_families, "Metric", refuse)
    recorder = MetricsRecorder()
    running = exporter(recorder)
    running._create_families()
    for _ in range(3):
        recorder.gauge("morph_level", 3)
        recorder.gauge("morph_level_max", 4)
        running._export(recorder.take())
    by_name = {family.name: family for family in metric_families.made}
    assert [metric.value for metric in by_name["morph_level_max"].metrics] == [4]
    assert sum("morph_level could not be exported" in r.message for r in caplog.records) == 1


def test_the_probes_connection_is_closed_at_the_end(endpoint: http.server.ThreadingHTTPServer) -> None:
    probe = BacklogProbe(("127.0.0.1", endpoint.server_address[1]), ("morph", "1"))
    assert probe() == probe() == 7
    assert len(Endpoint.connections) == 1
    probe.close()
    assert probe._page._connection is None


def test_buckets() -> None:
    assert one_two_five(60) == (1, 2, 5, 10, 20, 50)


def stats(**changed: Any) -> EngineStats:
    values: dict[str, Any] = {
        **dict.fromkeys(EngineStats.__struct_fields__, 0), "mode": "balanced", "layer_bits": [16, 8, 4, 4],
        "decisions": [], "decision_counts": {"down/kv_wait": 2}, "shifts_by_rung": {"w8": 5, "w4": 2, "full": 1},
        "shifts_down": 5, "shifts_up": 3, "kv_blocks_used": 5, "kv_blocks_capacity": 10,
        "kv_blocks_cached": 3, "prefix_queries": 40, "prefix_hits": 32,
        "signals": {"queue": True, "costs": False}, "estimate_errors": {"prompt": 0.25}, "cap": 0.5,
        "computed_tokens": 10, "clean_tokens": 8,
    }  # fmt: skip
    return EngineStats(**{**values, **changed})


def test_a_snapshot_becomes_metrics() -> None:
    recorder = MetricsRecorder()
    metrics = EngineMetrics(recorder)
    metrics.stats(stats())
    changes = recorder.take()
    gauges = {(name, *(v for _, v in labels)): value for (name, labels), value in changes.gauges.items()}
    counts = {(name, *(v for _, v in labels)): value for (name, labels), value in changes.counts.items()}
    assert gauges["vllm:kv_cache_usage_perc",] == 0.5
    assert [gauges["morph_layers", rung] for rung in ("full", "w8", "w4")] == [1, 1, 2]
    assert gauges["morph_layer_bits", "1"] == 8
    assert counts["morph_shifts_total", "down", "w8"] == 3 and counts["morph_shifts_total", "up", "w8"] == 2
    assert counts["morph_shifts_total", "down", "w4"] == 2 and counts["morph_shifts_total", "up", "full"] == 1
    assert counts["morph_decisions_total", "down", "kv_wait"] == 2
    assert gauges["morph_prefix_cached_blocks",] == 3
    assert (gauges["morph_signal_ok", "queue"], gauges["morph_signal_ok", "costs"]) == (1, 0)
    assert (gauges["morph_estimate_error", "prompt"], gauges["morph_cap",]) == (0.25, 0.5)
    assert gauges["morph_slo_feasible",] == 0
    kinds = ("clean", "degraded")
    assert [counts["morph_computed_tokens_total", kv] for kv in kinds] == [8, 2]
    assert (counts["vllm:prefix_cache_queries_total",], counts["vllm:prefix_cache_hits_total",]) == (40, 32)
    metrics.stats(stats(preemptions=4, decision_counts={"down/kv_wait": 3}))
    counts = {(name, *(v for _, v in labels)): value for (name, labels), value in recorder.take().counts.items()}
    assert counts["morph_preemptions_total",] == 4 and counts["morph_decisions_total", "down", "kv_wait"] == 1
    assert counts["morph_shifts_total", "down", "w4"] == 0


TEXT = """# HELP nv_inference_pending_request_count x
nv_inference_pending_request_count{model="morph",version="1"} 7
nv_inference_pending_request_count{model="other",version="1"} 100
nv_inference_queue_duration_us{model="morph",version="1"} 5000000
nv_inference_request_success{model="morph",version="1"} 10
nv_inference_request_success{model="morph",version="2"} 99
nv_inference_request_success{model="morph",version="1",x="a} b"} bad
"""


def test_the_queue_is_read_off_the_endpoint() -> None:
    assert parse_reading(TEXT, "morph", "1", 3.0) == QueueReading(3.0, 7, 5e6, 10.0)
    assert parse_reading("", "morph", "1", 3.0) == QueueReading(3.0, 0, 0.0, 0.0)


def test_signals() -> None:
    first = QueueReading(10.0, 2, 1e6, 5)
    assert make_signal(None, first, 1) == QueueSignal(taken_s=10.0, pending=3)
    second = QueueReading(10.5, 4, 3e6, 9)
    signal = make_signal(first, second, held=1, held_before=1)
    assert signal == QueueSignal(taken_s=10.5, pending=5, queue_time_s=0.5, arrivals_per_s=12.0)
    quiet = make_signal(second, QueueReading(11.0, 4, 3e6, 9), held=1, held_before=1)
    assert (quiet.queue_time_s, quiet.arrivals_per_s) == (0.0, 0.0)


class Endpoint(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    connections: ClassVar[set[Any]] = set()

    def do_GET(self) -> None:
        Endpoint.connections.add(self.client_address)
        self.send_response(200)
        self.send_header("Content-Length", str(len(TEXT)))
        self.end_headers()
        self.wfile.write(TEXT.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    Endpoint.connections = set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_the_watch_publishes_over_one_connection(endpoint: http.server.ThreadingHTTPServer) -> None:
    signals: list[QueueSignal] = []
    enough = threading.Event()

    def publish(signal: QueueSignal) -> None:
        signals.append(signal)
        if len(signals) >= 3:
            enough.set()

    watch = QueueWatch(("127.0.0.1", endpoint.server_address[1]), ("morph", "1"), 0.01, lambda: 1, publish)
    watch.start()
    assert enough.wait(60)
    watch.close()
    assert {s.pending for s in signals} == {8}
    assert len(Endpoint.connections) == 1


def test_an_unreachable_endpoint_is_no_signal() -> None:
    signals: list[QueueSignal] = []
    watch = QueueWatch(("127.0.0.1", 1), ("morph", "1"), 0.005, lambda: 0, signals.append)
    watch.start()
    threading.Event().wait(0.05)
    watch.close()
    assert signals == []
