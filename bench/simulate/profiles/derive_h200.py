"""Engine profiles of one H200 from what was measured there: `python bench/simulate/profiles/derive_h200.py`.

Llama-3-8B's shape, 24 GiB, is from this engine's own runs. Llama-2-7B's shape was never served by it on an H200: its
profile is the former, scaled as `SOURCES` says. Writes a file each beside this one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
BENCH = HERE.parents[1]
RUNGS = ("full", "w8", "w4")
LAYERS, BLOCK_TOKENS = 32, 16
BATCHES = (1, 8, 32, 64, 128, 200, 256)
PROMPT, OUTPUT = 128, 128
"""Of the static batches in bench/engine (of 256 sequences: 112 output tokens)."""
CHUNK, LONG = 2048, 8184
LINEARS_US = {"full": (181, 299, 1143), "w8": (108, 183, 669), "w4": (220, 388, 1322)}
"""The four linears of a Llama-3-8B layer at 256, 512 and 2,048 rows: the table in bench/gpu_kernels/README.md."""
LAYER_WEIGHTS = {"llama-3-8b": 218_103_808, "llama-2-7b": 202_375_168}
HEAD_BYTES = {"llama-3-8b": 2 * 128_256 * 4096, "llama-2-7b": 2 * 32_000 * 4096}
HEAD_BYTES_PER_S = 3.5e12
"""What cuBLAS reads at one row: 218 M bf16 weights in 124 us (the same table)."""
VLLM_7B_TOKENS = (22_208, 34_160, 40_240)
VLLM_8B_TOKENS = (63_104, 116_288, 141_056)
"""KV tokens in 24 GiB at each rung under vLLM 0.24 on an H200: full from bench/engine/README.md; Llama-2-7B from the
same measurement."""
EXTENT_BYTES = 64 * 2**20

SOURCES = {
    "decode": "whole_s to 256 tokens: ITL p50 of bench/engine/results (mean of both runs), less context_s times the "
    "mean context of these batches.",
    "prefill": "pair_s and whole_s at 2,048 tokens: prefills of 2,048 and 8,184 tokens in the same files, two "
    "equations in two unknowns; pair_s is the mean over the rungs. At 512 tokens: the linears of "
    "bench/gpu_kernels/README.md, and for the rest a straight line between what it is at 256 and at 2,048.",
    "context": "context_s: decode attention over 64 sequences of 2,048 tokens of mixed lengths, all layers, "
    "bench/gpu_kernels/results/attention.json.",
    "capacities": "KV tokens at the three uniform levels from bench/engine/results; between them a straight line, in "
    "whole extents of 64 MiB.",
    "shifts": "walks of 32 layers, settled, the second of run 2 in bench/engine/results: to W8, on to W4, and back.",
}
SOURCES_7B = {
    **SOURCES,
    "scaling": "Not measured with this engine. whole_s: Llama-3-8B's without its output matrix (read at 3.5 TB/s), "
    "times the ratio of the layers' weights, 0.928, with the output matrix of Llama-2-7B. context_s: attention.json "
    "with 32 KV heads. pair_s: times the ratio of both shapes' prefill attention of 8,192 tokens there. Shifts: times "
    "0.928. "
    "Capacities: vLLM's KV tokens for this shape in 24 GiB, less the bytes that this engine has less than vLLM for "
    "Llama-3-8B.",
}


def main() -> None:
    """Write both profiles."""
    runs = [json.loads((BENCH / f"engine/results/gpu_llama-3-8b_{n}.json").read_text()) for n in (1, 2)]
    attention = json.loads((BENCH / "gpu_kernels/results/attention.json").read_text())
    big = llama_3_8b(runs, attention)
    small = llama_2_7b(big, attention)
    for name, profile in (("h200_llama-3-8b_24gib", big), ("h200_llama-2-7b_24gib", small)):
        path = HERE / f"{name}.json"
        path.write_text(json.dumps({"name": name, **profile}, indent=1) + "\n")
        print(path.name, profile["capacities"][0], profile["capacities"][-1])


def llama_3_8b(runs: list[dict[str, Any]], attention: list[dict[str, Any]]) -> dict[str, Any]:
    """From this engine's runs."""
    context_s = LAYERS * decode_us(attention, 8) / 1e6 / (64 * 2048)
    batches = np.array(BATCHES)
    mean_context = PROMPT + np.where(batches == 256, 112, OUTPUT) / 2
    whole, pair = [], []
    for rung in RUNGS:
        decode = np.mean([[itl_s(run, rung, batch) for batch in BATCHES] for run in runs], axis=0)
        fixed = decode - context_s * batches * mean_context
        one = float(np.mean([prefill_s(run, rung, CHUNK) for run in runs]))
        long = float(np.mean([prefill_s(run, rung, LONG) for run in runs]))
        chunks = LONG / CHUNK
        pair.append((long - chunks * one) / (LONG * (LONG + 1) / 2 - chunks * CHUNK * (CHUNK + 1) / 2))
        whole.append([*fixed, one])
    pair_s = float(np.mean(pair))
    for row, rung in zip(whole, RUNGS, strict=True):
        row[-1] -= pair_s * CHUNK * (CHUNK + 1) / 2
        linears = [us * LAYERS / 1e6 for us in LINEARS_US[rung]]
        rest_256, rest_2048 = row[-2] - linears[0], row[-1] - linears[2]
        row.insert(-1, linears[1] + rest_256 + (rest_2048 - rest_256) * (512 - 256) / (2048 - 256))
    walks = {(w["from"], w["to"]): w["settled_ms"] / 1e3 for w in runs[1]["shift"]}
    down_w8, up_w8 = walks[0, 32] / LAYERS, walks[32, 0] / LAYERS
    down_w4, up_w4 = walks[0, 64] / LAYERS - down_w8, walks[64, 0] / LAYERS - up_w8
    tokens = [runs[0]["kv_tokens"][str(level)] for level in (0, LAYERS, 2 * LAYERS)]
    return document(whole, context_s, pair_s, (down_w8, down_w4), (up_w8, up_w4), tokens, 131_072, SOURCES)


def llama_2_7b(big: dict[str, Any], attention: list[dict[str, Any]]) -> dict[str, Any]:
    """Scaled."""
    costs = big["costs"]
    ratio = LAYER_WEIGHTS["llama-2-7b"] / LAYER_WEIGHTS["llama-3-8b"]
    head = {name: size / HEAD_BYTES_PER_S for name, size in HEAD_BYTES.items()}
    whole = (np.array(costs["whole_s"]) - head["llama-3-8b"]) * ratio + head["llama-2-7b"]
    token_bytes = {"llama-3-8b": 131_072, "llama-2-7b": 524_288}
    ours = [big["capacities"][k * LAYERS] * BLOCK_TOKENS for k in range(3)]
    less = np.mean(np.array(VLLM_8B_TOKENS) - ours) * token_bytes["llama-3-8b"]
    tokens = [int(n - less / token_bytes["llama-2-7b"]) for n in VLLM_7B_TOKENS]
    return document(
        whole.tolist(),
        LAYERS * decode_us(attention, 32) / 1e6 / (64 * 2048),
        costs["pair_s"] * prefill_us(attention, 32) / prefill_us(attention, 8),
        tuple(s * ratio for s in costs["downs_s"]),
        tuple(s * ratio for s in costs["ups_s"]),
        tokens,
        token_bytes["llama-2-7b"],
        SOURCES_7B,
    )


def document(
    whole: list[list[float]],
    context_s: float,
    pair_s: float,
    downs_s: tuple[float, ...],
    ups_s: tuple[float, ...],
    kv_tokens: list[int],
    token_bytes: int,
    sources: dict[str, str],
) -> dict[str, Any]:
    """The file's content."""
    quantum = EXTENT_BYTES // (token_bytes * BLOCK_TOKENS)
    levels = np.arange(2 * LAYERS + 1)
    blocks = np.interp(levels, [0, LAYERS, 2 * LAYERS], [n / BLOCK_TOKENS for n in kv_tokens])
    return {
        "sources": sources,
        "costs": {
            "rungs": list(RUNGS),
            "tokens": [*BATCHES, 512, CHUNK],
            "whole_s": [[round(s, 8) for s in row] for row in whole],
            "context_s": float(f"{context_s:.5g}"),
            "pair_s": float(f"{pair_s:.5g}"),
            "down_s": round(float(np.mean(downs_s)), 6),
            "up_s": round(float(np.mean(ups_s)), 6),
            "downs_s": [round(s, 6) for s in downs_s],
            "ups_s": [round(s, 6) for s in ups_s],
            "depth": 16,
        },
        "capacities": (blocks // quantum * quantum).astype(int).tolist(),
        "block_tokens": BLOCK_TOKENS,
        "max_num_seqs": 256,
        "max_num_batched_tokens": CHUNK,
        "overlap": True,
    }


def itl_s(run: dict[str, Any], rung: str, batch: int) -> float:
    """Measured seconds between tokens."""
    return float(next(row["itl_p50_ms"] for row in run[rung]["decode"] if row["batch"] == batch)) / 1e3


def prefill_s(run: dict[str, Any], rung: str, tokens: int) -> float:
    """Measured seconds of one prompt."""
    return float(next(row["ms"] for row in run[rung]["prefill"] if row["tokens"] == tokens)) / 1e3


def decode_us(attention: list[dict[str, Any]], kv_heads: int) -> float:
    """Measured microseconds of one layer's decode attention, 64 sequences of 2,048 tokens on average."""
    rows = [r for r in attention if r["kernel"] == "decode" and r["kv_heads"] == kv_heads and r["varied"]]
    return float(np.mean([r["us"] for r in rows if (r["sequences"], r["context"]) == (64, 2048)]))


def prefill_us(attention: list[dict[str, Any]], kv_heads: int) -> float:
    """Measured microseconds of one layer's prefill attention over 8,192 tokens."""
    rows = [r for r in attention if r["kernel"] == "prefill" and r["kv_heads"] == kv_heads]
    return max(float(r["us"]) for r in rows)


if __name__ == "__main__":
    main()
