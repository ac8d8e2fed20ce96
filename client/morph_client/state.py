"""What the server is doing at one moment, read out of its metrics page."""

from __future__ import annotations

import math
from dataclasses import dataclass

from morph_client.prometheus import Histogram, Metrics

# The names this module reads, so that a scraper can skip the rest of the page.
PREFIXES = ("morph_", "vllm:", "nv_inference_pending_request_count")


@dataclass(frozen=True)
class ServerState:
    """The wire contract's metrics under short names; ``None`` where the server does not report one."""

    level: int | None
    level_max: int | None
    mode: str | None
    cap: float | None
    """Share of the levels that may be used, besides the mode's own limit."""
    slo_feasible: bool | None
    """Whether some level that may be used is forecast to meet the SLOs."""
    layer_bits: tuple[int, ...]
    """16, 8 or 4 for each decoder layer, first to last."""
    kv_capacity: float | None
    """KV blocks now."""
    kv_used: float | None
    """KV blocks that hold live tokens."""
    kv_base: float | None
    """KV blocks at level 0."""
    kv_block_tokens: int | None
    kv_dtype: str | None
    """What the KV cache stores: `bfloat16`, `int8` and so on."""
    pending: float
    """Requests in Triton's queue."""
    waiting: float
    """Requests that left it and do not run yet."""
    running: float
    engine_up: bool | None
    heartbeat_s: float | None
    """Unix time of the engine's last message."""
    memory_bytes: dict[str, float]
    shifts: dict[str, float]
    """Finished layer shifts by direction, since the start."""
    decisions: dict[tuple[str, str], float]
    """Controller decisions by (action, reason), since the start."""
    generated_tokens: float
    preemptions: float
    tokens_by_rung: dict[str, float]
    ttft: Histogram | None
    tpot: Histogram | None
    ttft_slo_s: float | None
    """The time to first token that the controller defends, seconds."""

    @property
    def queued(self) -> float:
        """All requests that wait: in Triton's queue, for a credit, and in the engine."""
        return self.pending + self.waiting

    @classmethod
    def read(cls, metrics: Metrics, model: str = "morph") -> ServerState:
        """Takes the samples of one model out of a scrape."""

        def whole(name: str) -> int | None:
            value = metrics.get(name, model=model)
            return None if value is None or not math.isfinite(value) else round(value)

        def number(name: str) -> float:
            return metrics.get(name, model=model) or 0.0

        up = metrics.get("morph_engine_up", model=model)
        feasible = metrics.get("morph_slo_feasible", model=model)
        bits = metrics.by_label("morph_layer_bits", "layer", model=model)
        modes = metrics.by_label("morph_mode", "mode", model=model)
        kv_dtypes = metrics.by_label("morph_kv_dtype", "dtype", model=model)
        decisions = {
            (s.labels.get("action", ""), s.labels.get("reason", "")): s.value
            for s in metrics.samples("morph_decisions_total", model=model)
        }
        return cls(
            level=whole("morph_level"),
            level_max=whole("morph_level_max"),
            mode=next((mode for mode, on in modes.items() if on == 1), None),
            cap=metrics.get("morph_cap", model=model),
            slo_feasible=None if feasible is None else feasible == 1,
            layer_bits=tuple(round(bits[layer]) for layer in sorted(bits, key=_layer_number)),
            kv_capacity=metrics.get("morph_kv_blocks_capacity", model=model),
            kv_used=metrics.get("morph_kv_blocks_used", model=model),
            kv_base=metrics.get("morph_kv_blocks_base", model=model),
            kv_block_tokens=whole("morph_kv_block_tokens"),
            kv_dtype=next(iter(kv_dtypes), None),
            pending=number("nv_inference_pending_request_count"),
            waiting=number("morph_requests_in_line") + number("morph_execute_waiting"),
            running=number("vllm:num_requests_running"),
            engine_up=None if up is None else up == 1,
            heartbeat_s=metrics.get("morph_engine_heartbeat_seconds", model=model),
            memory_bytes=metrics.by_label("morph_memory_bytes", "kind", model=model),
            shifts=metrics.by_label("morph_shifts_total", "direction", model=model),
            decisions=decisions,
            generated_tokens=number("vllm:generation_tokens_total"),
            preemptions=number("morph_preemptions_total"),
            tokens_by_rung=metrics.by_label("morph_tokens_total", "rung", model=model),
            ttft=metrics.histogram("vllm:time_to_first_token_seconds", model=model),
            tpot=metrics.histogram("vllm:time_per_output_token_seconds", model=model),
            ttft_slo_s=metrics.get("morph_ttft_slo_seconds", model=model),
        )


def _layer_number(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdigit() else (1 << 30, label)
