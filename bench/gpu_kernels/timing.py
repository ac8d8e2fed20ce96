"""Times of GPU kernels, and a place for the results."""

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


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Microseconds per call: all calls captured in one CUDA graph, the best of some replays.

    Let the calls touch different memory, more than the L2 cache holds.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return min(times[1:])


def save(name: str, rows: list[dict[str, object]]) -> None:
    """Write rows as JSON into the folder that OUT names, if it does."""
    if out := os.environ.get("OUT"):
        Path(out, f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
