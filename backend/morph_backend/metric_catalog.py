"""Every metric that the model exports: name, kind, meaning, buckets. `docs/wire.md` is its contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


@dataclass(frozen=True)
class MetricSpec:
    """One metric family."""

    kind: str
    description: str
    buckets: tuple[float, ...] = ()


_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_E2E = (1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)


def catalog(max_model_len: int) -> Mapping[str, MetricSpec]:
    """All families; the token buckets go up to `max_model_len`."""
    tokens = one_two_five(max_model_len)
    return {
        "vllm:prompt_tokens_total": MetricSpec(COUNTER, "Prompt tokens processed."),
        "vllm:generation_tokens_total": MetricSpec(COUNTER, "Output tokens generated."),
        "vllm:time_to_first_token_seconds": MetricSpec(HISTOGRAM, "Seconds from arrival to the first token.", _TTFT),
        "vllm:time_per_output_token_seconds": MetricSpec(HISTOGRAM, "Seconds between output tokens.", _TPOT),
        "vllm:e2e_request_latency_seconds": MetricSpec(HISTOGRAM, "Seconds from arrival to the last token.", _E2E),
        "vllm:request_prompt_tokens": MetricSpec(HISTOGRAM, "Prompt tokens per request.", tokens),
        "vllm:request_generation_tokens": MetricSpec(HISTOGRAM, "Tokens of each output.", tokens),
        "vllm:request_params_n": MetricSpec(HISTOGRAM, "Outputs per request.", (1.0, 2.0, 5.0, 10.0, 20.0)),
        "vllm:num_requests_running": MetricSpec(GAUGE, "Requests that the engine runs."),
        "vllm:num_requests_waiting": MetricSpec(GAUGE, "Requests that wait, in Triton's queue or the engine."),
        "vllm:kv_cache_usage_perc": MetricSpec(GAUGE, "KV blocks in use over capacity, 0 to 1."),
        "vllm:prefix_cache_queries_total": MetricSpec(COUNTER, "Prompt tokens looked up in the prefix cache."),
        "vllm:prefix_cache_hits_total": MetricSpec(COUNTER, "Prompt tokens found in the prefix cache."),
        "nv_trt_llm_request_metrics": MetricSpec(GAUGE, "Requests by state: waiting, scheduled, active, max."),
        "nv_trt_llm_kv_cache_block_metrics": MetricSpec(GAUGE, "KV blocks: used, free, max, tokens_per, fraction."),
        "morph_requests_in_line": MetricSpec(GAUGE, "Requests that wait in the engine for their first step."),
        "morph_ttft_slo_seconds": MetricSpec(GAUGE, "The time to first token that the controller defends."),
        "morph_level": MetricSpec(GAUGE, "Level in force; 0 is full precision."),
        "morph_level_max": MetricSpec(GAUGE, "The deepest level."),
        "morph_layers": MetricSpec(GAUGE, "Decoder layers at each rung."),
        "morph_layer_bits": MetricSpec(GAUGE, "Bits per weight of each decoder layer: 16, 8 or 4."),
        "morph_kv_blocks_capacity": MetricSpec(GAUGE, "KV blocks that exist now."),
        "morph_kv_blocks_used": MetricSpec(GAUGE, "KV blocks in use."),
        "morph_prefix_cached_blocks": MetricSpec(GAUGE, "KV blocks that no request holds and the prefix cache keeps."),
        "morph_kv_blocks_base": MetricSpec(GAUGE, "KV blocks at level 0."),
        "morph_kv_block_tokens": MetricSpec(GAUGE, "Tokens per KV block."),
        "morph_kv_dtype": MetricSpec(GAUGE, "1 for what the KV cache stores."),
        "morph_memory_bytes": MetricSpec(GAUGE, "Bytes of the memory budget by use."),
        "morph_shifts_total": MetricSpec(COUNTER, "Finished layer shifts by direction and rung reached."),
        "morph_shift_seconds_total": MetricSpec(COUNTER, "Seconds spent in layer shifts."),
        "morph_decisions_total": MetricSpec(COUNTER, "Decisions of the controller by action and reason."),
        "morph_blocks_migrated_total": MetricSpec(COUNTER, "Live KV blocks moved so that the cache could shrink."),
        "morph_preemptions_total": MetricSpec(COUNTER, "Requests preempted and recomputed later."),
        "morph_tokens_total": MetricSpec(COUNTER, "Output tokens by rung, weighted by layer."),
        "morph_requests_total": MetricSpec(COUNTER, "Requests by outcome."),
        "morph_engine_up": MetricSpec(GAUGE, "1 while the engine process answers."),
        "morph_engine_restarts_total": MetricSpec(COUNTER, "Engine processes started in place of one that has ended."),
        "morph_backend_errors_total": MetricSpec(COUNTER, "Defects caught in threads of the serving process."),
        "morph_engine_heartbeat_seconds": MetricSpec(
            GAUGE, "Unix time of the engine's last message, or now while it is restarted."
        ),
        "morph_mode": MetricSpec(GAUGE, "1 for the mode in force."),
        "morph_cap": MetricSpec(GAUGE, "Share of the levels that may be used, besides the mode's own limit."),
        "morph_slo_feasible": MetricSpec(GAUGE, "0 while no level that may be used is forecast to meet the SLOs."),
        "morph_signal_ok": MetricSpec(GAUGE, "1 while an input of the controller is there and fresh."),
        "morph_estimate_error": MetricSpec(GAUGE, "Mean error of estimates about Triton's queue: share, or seconds."),
        "morph_computed_tokens_total": MetricSpec(COUNTER, "Tokens computed by what went into them: clean, degraded."),
        "morph_gpu_memory_used_ratio": MetricSpec(GAUGE, "Share of the GPU's memory in use, as NVML shows it."),
        "morph_queue_nudges_total": MetricSpec(COUNTER, "Expired requests sent to keep Triton's queue moving."),
        "morph_execute_waiting": MetricSpec(GAUGE, "1 while a request waits in execute() for a credit."),
    }


def one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... as far as `limit`."""
    buckets: list[float] = []
    power = 1
    while power <= limit:
        buckets.extend(float(step * power) for step in (1, 2, 5) if step * power <= limit)
        power *= 10
    return tuple(buckets)
