"""A picture of what ran on the GPU while layers changed, from the trace that gpu.py writes.

python bench/engine/plot_trace.py RESULT.trace.json PICTURE.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = (
    ("matrix products", "#4c78a8", ("nvjet", "splitK", "gemm", "rows_product", "int4_product", "cutlass")),
    ("attention", "#72b7b2", ("_decode", "_join", "_prefill")),
    ("quantize a layer (down)", "#e45756", ("pack_",)),
    ("copy a layer from the host (up)", "#f58518", ("HtoD",)),
    ("the rest of a step", "#b8b8b8", ("",)),
)
Event = tuple[float, float, int, str]


def kind_of(name: str) -> int:
    """Index into KINDS."""
    return next(i for i, (_, _, marks) in enumerate(KINDS) if any(mark in name for mark in marks))


def draw(axes: plt.Axes, events: list[Event], title: str) -> None:
    """One walk: the steps' stream above, the side stream below."""
    steps = max({e[2] for e in events}, key=lambda stream: sum(1 for e in events if e[2] == stream))
    first = min(e[0] for e in events if e[2] == steps)
    events = [e for e in events if e[0] >= first - 3000]
    first = events[0][0]
    for number, (_, colour, _) in enumerate(KINDS):
        for row, mine in ((1, True), (0, False)):
            bars = [
                ((start - first) / 1e3, max(length, 8) / 1e3)
                for start, length, stream, name in events
                if kind_of(name) == number and (stream == steps) == mine
            ]
            axes.broken_barh(bars, (row - 0.38, 0.76), facecolors=colour, linewidth=0)
    axes.set_yticks([0, 1], ["side stream", "steps"])
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Read the trace, write the picture."""
    source, target = map(Path, sys.argv[1:3])
    trace = json.loads(source.read_text(encoding="utf-8"))
    figure, (down, up) = plt.subplots(2, 1, figsize=(11, 4.6), constrained_layout=True)
    draw(down, trace["down"], "Four layers of Llama-3-8B go to W8 while 64 sequences decode")
    draw(up, trace["up"], "The same layers come back to bfloat16")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour, _ in KINDS]
    figure.legend(
        handles, [name for name, _, _ in KINDS], loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
