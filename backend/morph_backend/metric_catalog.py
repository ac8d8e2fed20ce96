"""Every metric that the model exports: name, kind, meaning, unit, labels, buckets.

`docs/metrics.md` is made from it: run `python tools/metrics_reference.py` after a change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from morph_backend.rungs import RUNGS
from morph_runtime.config import MODES

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


@dataclass(frozen=True)
class MetricSpec:
    """One metric family.

    Attributes:
        kind: COUNTER, GAUGE or HISTOGRAM.
        description: one sentence, also the HELP text on the metrics page.
        buckets: of a histogram, in its unit.
        unit: of its numbers, where the name does not end with it (`unit_of`).
        labels: those besides `model` and `version`, with what they may be, in Markdown.
    """

    kind: str
    description: str
    buckets: tuple[float, ...] = ()
    unit: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
"""Triton's vLLM backend ends at 10 s. As in vLLM's own server they go on: a target above 10 s can be missed too."""
_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_RUNGS = ", ".join(f"`{rung}`" for rung in RUNGS)
_MODES = ", ".join(f"`{mode}`" for mode in MODES)
_DIRECTIONS = "`down`, `up`"
_UNITS = (
    "seconds",
    "bytes",
    "tokens",
    "blocks",
    "requests",
    "layers",
    "shifts",
    "decisions",
    "restarts",
    "errors",
    "nudges",
)
_E2E = (1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)


def catalog(max_model_len: int) -> Mapping[str, MetricSpec]:
    """All families; the token buckets go up to `max_model_len`."""
    tokens = one_two_five(max_model_len)
    return {
        "vllm:prompt_tokens_total": MetricSpec(COUNTER, "Prompt tokens of the requests that the engine has begun."),
        "vllm:generation_tokens_total": MetricSpec(COUNTER, "Output tokens generated."),
        "vllm:time_to_first_token_seconds": MetricSpec(
            HISTOGRAM, "From the arrival in the model, so without Triton's queue, to the first token.", _TTFT
        ),
        "vllm:time_per_output_token_seconds": MetricSpec(
            HISTOGRAM,
            "Between two tokens of one output; of more than 100 in one export, 100 that stand for all.",
            _TPOT,
        ),
        "vllm:e2e_request_latency_seconds": MetricSpec(
            HISTOGRAM,
            "From the arrival in the model to the last token, of requests that end with stop or length.",
            _E2E,
        ),
        "vllm:request_prompt_tokens": MetricSpec(HISTOGRAM, "Prompt tokens of each request.", tokens),
        "vllm:request_generation_tokens": MetricSpec(HISTOGRAM, "Tokens of each output.", tokens),
        "vllm:request_params_n": MetricSpec(
            HISTOGRAM, "Outputs of each request.", (1.0, 2.0, 5.0, 10.0, 20.0), unit="outputs"
        ),
        "vllm:num_requests_running": MetricSpec(GAUGE, "Requests that the engine runs."),
        "vllm:num_requests_waiting": MetricSpec(
            GAUGE, "Requests that wait, in Triton's queue or in the engine's line."
        ),
        "vllm:kv_cache_usage_perc": MetricSpec(
            GAUGE, "KV blocks in use, of those that exist now.", unit="share, 0 to 1"
        ),
        "vllm:prefix_cache_queries_total": MetricSpec(
            COUNTER,
            "Prompt tokens looked up in the prefix cache; each request counts once, at its first step.",
            unit="tokens",
        ),
        "vllm:prefix_cache_hits_total": MetricSpec(COUNTER, "Those of them that it held.", unit="tokens"),
        "nv_trt_llm_request_metrics": MetricSpec(
            GAUGE,
            "Requests as Triton's TensorRT-LLM backend shows them.",
            unit="requests",
            labels={
                "request_type": "`waiting` (queue and line), `scheduled` (running), `active` (in the engine), `max`"
            },
        ),
        "nv_trt_llm_kv_cache_block_metrics": MetricSpec(
            GAUGE,
            "KV blocks as Triton's TensorRT-LLM backend shows them; they follow the elastic capacity.",
            unit="blocks",
            labels={"kv_cache_block_type": "`used`, `free`, `max`, `tokens_per` (tokens), `fraction` (0 to 1)"},
        ),
        "morph_requests_in_line": MetricSpec(GAUGE, "Requests that wait in the engine for their first step."),
        "morph_ttft_slo_seconds": MetricSpec(GAUGE, "The time to first token that the controller defends."),
        "morph_level": MetricSpec(GAUGE, "Level in force; 0 is full precision.", unit="level"),
        "morph_level_max": MetricSpec(GAUGE, "The deepest level.", unit="level"),
        "morph_layers": MetricSpec(GAUGE, "Decoder layers at each rung.", labels={"rung": _RUNGS}),
        "morph_layer_bits": MetricSpec(
            GAUGE,
            "Bits per weight of each decoder layer: 16, 8 or 4.",
            unit="bits",
            labels={"layer": "its number, from 0"},
        ),
        "morph_kv_blocks_capacity": MetricSpec(GAUGE, "KV blocks that exist now."),
        "morph_kv_blocks_used": MetricSpec(GAUGE, "KV blocks that requests hold."),
        "morph_prefix_cached_blocks": MetricSpec(
            GAUGE, "KV blocks that no request holds and the prefix cache keeps; they count as free."
        ),
        "morph_kv_blocks_base": MetricSpec(GAUGE, "KV blocks at level 0."),
        "morph_kv_block_tokens": MetricSpec(GAUGE, "Tokens per KV block."),
        "morph_kv_dtype": MetricSpec(
            GAUGE,
            "1 for what the KV cache stores.",
            unit="1",
            labels={"dtype": "`bfloat16`, `float32`, `fp8`, `int8`"},
        ),
        "morph_memory_bytes": MetricSpec(
            GAUGE,
            "The memory budget and what it holds.",
            labels={"kind": "`weights`, `kv`, `free`, `static`; `budget` is what they may be together"},
        ),
        "morph_shifts_total": MetricSpec(
            COUNTER,
            "Finished shifts of one layer.",
            labels={"direction": _DIRECTIONS, "rung": f"the one reached: {_RUNGS}"},
        ),
        "morph_shift_seconds_total": MetricSpec(
            COUNTER, "Time spent in layer shifts.", labels={"direction": _DIRECTIONS}
        ),
        "morph_decisions_total": MetricSpec(
            COUNTER,
            "Decisions of the controller.",
            labels={"action": "`down`, `up`, `hold`", "reason": "a word or two, such as `kv_wait`"},
        ),
        "morph_blocks_migrated_total": MetricSpec(COUNTER, "Live KV blocks moved so that the cache could shrink."),
        "morph_preemptions_total": MetricSpec(COUNTER, "Requests preempted, to be recomputed later.", unit="requests"),
        "morph_tokens_total": MetricSpec(
            COUNTER,
            "Output tokens by precision: one at level k of L layers counts k/L as quantized.",
            labels={"rung": _RUNGS},
        ),
        "morph_requests_total": MetricSpec(
            COUNTER,
            "Requests that have ended.",
            labels={"outcome": "`stop`, `length`, `cancelled`, `rejected` (bad input), `error` (the server's fault)"},
        ),
        "morph_engine_up": MetricSpec(GAUGE, "1 while the engine process answers.", unit="1"),
        "morph_engine_restarts_total": MetricSpec(COUNTER, "Engine processes started in place of one that has ended."),
        "morph_backend_errors_total": MetricSpec(
            COUNTER,
            "Defects caught in threads of the serving process; the log has the traceback.",
            labels={"thread": "its name"},
        ),
        "morph_engine_heartbeat_seconds": MetricSpec(
            GAUGE, "Unix time of the engine's last message, or now while it is restarted."
        ),
        "morph_mode": MetricSpec(GAUGE, "1 for the mode in force.", unit="1", labels={"mode": _MODES}),
        "morph_cap": MetricSpec(
            GAUGE, "Share of the levels that may be used, besides the mode's own limit.", unit="share, 0 to 1"
        ),
        "morph_slo_feasible": MetricSpec(
            GAUGE, "0 while no level that may be used is forecast to meet the SLOs.", unit="1"
        ),
        "morph_signal_ok": MetricSpec(
            GAUGE,
            "1 while an input of the controller is there and fresh.",
            unit="1",
            labels={"signal": "`queue` (Triton's metrics), `costs` (the cost model)"},
        ),
        "morph_estimate_error": MetricSpec(
            GAUGE,
            "Mean error of estimates about Triton's queue.",
            unit="share; seconds for `queue_age`",
            labels={"what": "`prompt`, `output` (lengths), `queue_age`"},
        ),
        "morph_computed_tokens_total": MetricSpec(
            COUNTER,
            "Tokens computed, counted when their request is over.",
            labels={"kv": "`clean` (nothing below full precision went into them, KV included), `degraded`"},
        ),
        "morph_gpu_memory_used_ratio": MetricSpec(
            GAUGE, "Share of the GPU's memory in use, as NVML shows it; 0 without a GPU.", unit="share, 0 to 1"
        ),
        "morph_queue_nudges_total": MetricSpec(
            COUNTER,
            "Expired requests sent to keep Triton's queue moving; Triton books each as a failure with reason REJECTED.",
        ),
        "morph_execute_waiting": MetricSpec(
            GAUGE, "1 while a request waits in execute() for a credit.", unit="requests"
        ),
    }


def unit_of(name: str, spec: MetricSpec) -> str:
    """What a metric's numbers are: as it says, or else the last word of its name that is a unit."""
    words = re.split("[:_]", name.removesuffix("_total"))
    return spec.unit or next((word for word in reversed(words) if word in _UNITS), "")


def one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... as far as `limit`."""
    buckets: list[float] = []
    power = 1
    while power <= limit:
        buckets.extend(float(step * power) for step in (1, 2, 5) if step * power <= limit)
        power *= 10
    return tuple(buckets)
