"""A picture of one case: waiting, TTFT and the level over time, morphing beside static rungs.

    python bench/serving/plot_burst.py bench/serving/results/h200.json kv docs/images/burst_h200.png

Takes the JSON of `gpu.py`; of each variant the first repeat.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client"))

from morph_client.palette import light
from morph_client.report.plot import style_axis

NAMES = {"full": "static full precision", "w8": "static W8", "w4": "static W4", "balanced": "morphing"}
COLOURS = {"full": "#9a9a9a", "w8": "#e08a3c", "w4": "#8b6bb1", "balanced": "#2a6fbb"}
TITLES = {"kv": "Llama-2-7B's shape, 24 GiB, one H200", "compute": "Llama-3-8B's shape, 24 GiB, one H200"}


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("kind")
    parser.add_argument("out", type=Path)
    parser.add_argument("--until", type=float, default=32.0, help="seconds")
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for job in json.loads(given.result.read_text(encoding="utf-8"))["jobs"]:
        if job["kind"] == given.kind and "failed" not in job["result"]:
            found.setdefault(job["variant"], job["result"])
    theme = light()
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10.0, 7.2), facecolor=theme.background)
    axes = figure.subplots(3, 1, sharex=True)
    figure.subplots_adjust(left=0.065, right=0.935, top=0.855, bottom=0.075, hspace=0.38)
    for variant in [name for name in NAMES if name in found]:
        result, colour, name = found[variant], COLOURS[variant], NAMES[variant]
        p95 = result["ttft_s"]["p95"]
        states = result["states"]
        times = [state["at_s"] for state in states]
        axes[0].plot(times, [state["queued"] for state in states], color=colour, linewidth=1.8, label=name)
        due, ttft = zip(*((request[0], request[3]) for request in result["requests_detail"]), strict=True)
        axes[1].scatter(due, ttft, s=9, color=colour, linewidths=0, label=f"{name}: p95 {p95:.2f} s")
    morphing = found["balanced"]["states"]
    times = [state["at_s"] for state in morphing]
    tokens = 16 / 1000
    axes[2].fill_between(
        times, [state["kv_used"] * tokens for state in morphing], step="post", color=COLOURS["balanced"], alpha=0.25,
        linewidth=0, label="KV tokens in use",
    )  # fmt: skip
    axes[2].step(times, [state["kv_capacity"] * tokens for state in morphing], where="post", color=COLOURS["balanced"],
                 linewidth=1.8, label="KV capacity")  # fmt: skip
    axes[2].axhline(morphing[0]["kv_base"] * tokens, color=COLOURS["full"], linewidth=1.2, linestyle=(0, (4, 3)),
                    label="capacity at full precision")  # fmt: skip
    level = axes[2].twinx()
    level.step(times, [state["level"] for state in morphing], where="post", color=COLOURS["w8"], linewidth=1.4)
    level.set_ylabel("layers at W8", color=COLOURS["w8"], fontsize=9.5)
    level.set_ylim(0, 34)
    headings = ("Requests in Triton's queue", "Time to first token, by the time a request was due, seconds",
                "Morphing: KV cache, thousands of tokens; layers at W8")  # fmt: skip
    for axis, heading in zip(axes, headings, strict=True):
        style_axis(axis, theme)
        axis.set_title(heading, loc="left", fontsize=10.5, color=theme.text, pad=5, fontweight="bold")
        axis.set_ylim(bottom=0)
        axis.legend(
            frameon=False, fontsize=9, labelcolor=theme.text, loc="upper right" if axis is not axes[2] else "upper left"
        )
    level.tick_params(colors=COLOURS["w8"], labelsize=9.5, length=0)
    for spine in level.spines.values():
        spine.set_visible(False)
    axes[1].axhline(2.0, color=theme.muted, linewidth=1.0, linestyle=(0, (2, 2)))
    axes[1].annotate("SLO", (0.2, 2.0), fontsize=9, color=theme.muted, va="bottom")
    axes[-1].set_xlim(0, given.until)
    axes[-1].set_xlabel("seconds", fontsize=10, color=theme.muted)
    late = {name: found[name]["over_slo"] for name in found}
    share = found["balanced"]["level0_tokens"]
    figure.text(0.065, 0.96, "One burst, three ways to serve it", fontsize=15, fontweight="bold", color=theme.text)
    figure.text(
        0.065, 0.905,
        f"{TITLES.get(given.kind, given.kind)}; {len(due)} requests; over 2 s: "
        + ", ".join(f"{late[name]:.0%} {NAMES[name]}" for name in NAMES if name in late)
        + f".\n{share:.0%} of morphing's tokens came from full precision in every layer.",
        fontsize=10, color=theme.muted,
    )  # fmt: skip
    figure.savefig(given.out, dpi=150, facecolor=figure.get_facecolor())


if __name__ == "__main__":
    main()
