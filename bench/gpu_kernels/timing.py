"""Times of kernels on a GPU under CUDA graph replay, with operands that no cache holds; a place for the results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

COPY_GB_S = 4300.0
"""Read plus written by a large device-to-device copy on an H200."""
MATRIX_TFLOP_S = 790.0
"""bf16 matrix product of 8192 cubed on random data on an H200."""
FOOTPRINT = 200 << 20
"""Bytes that one replay walks through: several times the L2 of any GPU here."""

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "llama-3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama-2-7b": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "codellama-34b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (44032, 8192), "down": (8192, 22016)},
}
"""[N, K] of the four linears of one layer."""


def copies(nbytes: int) -> int:
    """How many copies of weights of this size make the footprint."""
    return max(2, -(-FOOTPRINT // nbytes))


def graph_us(calls: Sequence[Callable[[], object]], least_calls: int = 8, replays: int = 3) -> float:
    """Microseconds of one call, the best of some replays of a graph that makes all of them, at least `least_calls`."""
    rounds = max(1, -(-least_calls // len(calls)))
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    best = float("inf")
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best * 1000 / (rounds * len(calls))


def save(name: str, rows: list[dict[str, object]]) -> None:
    """Write rows as JSON into the folder that OUT names, if it does."""
    if out := os.environ.get("OUT"):
        Path(out, f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
