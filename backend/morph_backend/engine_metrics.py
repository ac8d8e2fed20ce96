"""The engine's snapshots as metrics."""

from __future__ import annotations

import time
from collections import Counter

from morph_backend.recorder import MetricsRecorder
from morph_backend.rungs import RUNG_OF_BITS, RUNGS
from morph_runtime.config import MODES
from morph_runtime.engine.messages import EngineInfo, EngineStats

_REQUESTS = "nv_trt_llm_request_metrics"


class EngineMetrics:
    """Writes `EngineInfo` and `EngineStats` into the recorder. Called from one thread at a time, but for `outer`.

    The `nv_trt_llm_*` families are those of Triton's TensorRT-LLM backend: load balancers (the ORCA header of Triton's
    HTTP endpoint, Kubernetes' Gateway API) read them, and see a capacity that grows and shrinks.
    """

    def __init__(self, recorder: MetricsRecorder) -> None:
        self._recorder = recorder
        self._layer_bits: list[int] = []
        self._outer = 0
        self._line = 0

    def start(self, info: EngineInfo) -> None:
        """The facts that do not change, and zeros for what has not happened yet."""
        record = self._recorder
        record.gauge("morph_level", 0)
        record.gauge("morph_level_max", info.level_max)
        record.gauge("morph_kv_blocks_base", info.base_blocks)
        record.gauge("morph_kv_blocks_capacity", info.base_blocks)
        record.gauge("morph_kv_blocks_used", 0)
        record.gauge("morph_prefix_cached_blocks", 0)
        record.gauge("morph_kv_block_tokens", info.block_tokens)
        record.gauge("morph_kv_dtype", 1, dtype=info.kv_dtype)
        record.gauge("morph_memory_bytes", info.budget_bytes, kind="budget")
        record.declare("morph_engine_restarts_total")
        record.gauge("morph_cap", 1)
        record.gauge("morph_slo_feasible", 1)
        record.gauge("morph_gpu_memory_used_ratio", 0)
        for signal in ("queue", "costs"):
            record.gauge("morph_signal_ok", 0, signal=signal)
        for what in ("prompt", "output", "queue_age"):
            record.gauge("morph_estimate_error", 0, what=what)
        for kv in ("clean", "degraded"):
            record.declare("morph_computed_tokens_total", kv=kv)
        record.gauge(_REQUESTS, info.max_num_seqs, request_type="max")
        self.requests(0, 0)
        self._kv(0, info.base_blocks, info.block_tokens)
        self.up(True)

    def outer(self, pending: int) -> None:
        """Requests in Triton's queue, the one held in `execute()` included. Called by the queue watch's thread."""
        self._outer = pending
        self._waiting()

    def requests(self, waiting: int, running: int) -> None:
        """Requests in the engine's line, and those it runs."""
        record = self._recorder
        self._line = waiting
        record.gauge("morph_requests_in_line", waiting)
        record.gauge("vllm:num_requests_running", running)
        record.gauge(_REQUESTS, running, request_type="scheduled")
        record.gauge(_REQUESTS, running + waiting, request_type="active")
        self._waiting()

    def up(self, up: bool) -> None:
        """Whether the engine answers."""
        self._recorder.gauge("morph_engine_up", 1 if up else 0)
        if up:
            self.beat()
        else:
            self.requests(0, 0)
            # Here and not in `restarted`: the next engine's first snapshot may come before that word.
            self._recorder.restart_totals()

    def restarted(self) -> None:
        """Another engine process is there in place of one that has ended."""
        self._recorder.count("morph_engine_restarts_total")
        self.up(True)

    def beat(self) -> None:
        """A message of the engine has come, or it is being restarted."""
        self._recorder.gauge("morph_engine_heartbeat_seconds", time.time())

    def stats(self, stats: EngineStats) -> None:
        """One snapshot."""
        record = self._recorder
        self.beat()
        self.requests(stats.waiting, stats.running)
        self._kv(stats.kv_blocks_used, stats.kv_blocks_capacity)
        record.gauge("morph_level", stats.level)
        record.gauge("morph_kv_blocks_capacity", stats.kv_blocks_capacity)
        record.gauge("morph_kv_blocks_used", stats.kv_blocks_used)
        record.gauge("morph_prefix_cached_blocks", stats.kv_blocks_cached)
        self._layers(stats.layer_bits)
        sizes = {"weights": stats.weights_bytes, "kv": stats.kv_bytes, "free": stats.free_bytes}
        for kind, size in {**sizes, "static": stats.static_bytes}.items():
            record.gauge("morph_memory_bytes", size, kind=kind)
        for mode in MODES:
            record.gauge("morph_mode", 1 if mode == stats.mode else 0, mode=mode)
        self._controller(stats)
        self._counters(stats)

    def _controller(self, stats: EngineStats) -> None:
        record = self._recorder
        record.gauge("morph_cap", stats.cap)
        record.gauge("morph_slo_feasible", 1 if stats.slo_feasible else 0)
        for signal, there in stats.signals.items():
            record.gauge("morph_signal_ok", 1 if there else 0, signal=signal)
        for what, error in stats.estimate_errors.items():
            record.gauge("morph_estimate_error", error, what=what)
        record.gauge("morph_gpu_memory_used_ratio", max(0.0, stats.gpu_used_share))

    def _waiting(self) -> None:
        self._recorder.gauge("vllm:num_requests_waiting", self._outer + self._line)
        self._recorder.gauge(_REQUESTS, self._outer + self._line, request_type="waiting")

    def _kv(self, used: int, capacity: int, block_tokens: int = 0) -> None:
        share = used / max(1, capacity)
        self._recorder.gauge("vllm:kv_cache_usage_perc", share)
        kinds = {"fraction": share, "used": used, "free": capacity - used, "max": capacity}
        if block_tokens:
            kinds["tokens_per"] = block_tokens
        for kind, value in kinds.items():
            self._recorder.gauge("nv_trt_llm_kv_cache_block_metrics", value, kv_cache_block_type=kind)

    def _layers(self, bits: list[int]) -> None:
        if bits == self._layer_bits:
            return
        counts = Counter(RUNG_OF_BITS.get(b, "full") for b in bits)
        for rung in RUNGS:
            self._recorder.gauge("morph_layers", counts[rung], rung=rung)
        for layer, value in enumerate(bits):
            self._recorder.gauge("morph_layer_bits", value, layer=str(layer))
        self._layer_bits = list(bits)

    def _counters(self, stats: EngineStats) -> None:
        record = self._recorder
        for (direction, rung), count in shifts_by_direction(stats).items():
            record.total("morph_shifts_total", count, direction=direction, rung=rung)
        record.total("morph_shift_seconds_total", stats.shift_down_seconds, direction="down")
        record.total("morph_shift_seconds_total", stats.shift_up_seconds, direction="up")
        for key, count in stats.decision_counts.items():
            action, _, reason = key.partition("/")
            record.total("morph_decisions_total", count, action=action, reason=reason)
        record.total("morph_blocks_migrated_total", stats.blocks_migrated)
        record.total("morph_preemptions_total", stats.preemptions)
        record.total("morph_computed_tokens_total", stats.clean_tokens, kv="clean")
        record.total("morph_computed_tokens_total", stats.computed_tokens - stats.clean_tokens, kv="degraded")
        record.total("vllm:prefix_cache_queries_total", stats.prefix_queries)
        record.total("vllm:prefix_cache_hits_total", stats.prefix_hits)


def shifts_by_direction(stats: EngineStats) -> dict[tuple[str, str], int]:
    """Shifts by direction and rung reached.

    Full precision is reached going up alone and W4 going down alone; what is left of the shifts up reached W8.
    """
    reached = stats.shifts_by_rung
    up_full = min(reached.get("full", 0), stats.shifts_up)
    up_w8 = min(stats.shifts_up - up_full, reached.get("w8", 0))
    return {
        ("up", "full"): up_full,
        ("up", "w8"): up_w8,
        ("down", "w8"): reached.get("w8", 0) - up_w8,
        ("down", "w4"): reached.get("w4", 0),
    }
