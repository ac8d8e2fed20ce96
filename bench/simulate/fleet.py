"""How many GPUs a bursty day needs, with and without morphing: `python bench/simulate/fleet.py WINDOW.csv`.

WINDOW.csv is a burst to repeat (columns arrival_s, prompt_tokens, output_tokens; the Azure code window of
bench/simulate/README.md). The trace: a Poisson base load with the window's lengths, and the window itself at random
times, whole or every second or third request of it. Each policy serves it with 1, 2, … servers behind a balancer, and
under the autoscaler of deploy/kubernetes/overlays/autoscaled-hpa. Writes JSON and a picture.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from morph_runtime.config import MorphSettings
from morph_runtime.simulate.arrivals import Arrivals
from morph_runtime.simulate.autoscaler import ScalerSettings
from morph_runtime.simulate.engine_profile import read_profile
from morph_runtime.simulate.fleet import Fleet
from morph_runtime.simulate.pilot import quiet_controller
from morph_runtime.simulate.scenario import Policy

HERE = Path(__file__).resolve().parent
COLOURS = {"static full": "#4a86c5", "static w8": "#d9a441", "balanced": "#2a9d9f"}


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("window", type=Path)
    parser.add_argument("--profile", type=Path, default=HERE / "profiles/h200_llama-3-8b_24gib.json")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second of the base load")
    parser.add_argument("--gap", type=float, default=300.0, help="mean seconds between bursts")
    parser.add_argument("--servers", type=int, default=5, help="the largest fleet of fixed size")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between the controller's decisions")
    parser.add_argument("--slo", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results/fleet.json")
    options = parser.parse_args()
    quiet_controller()
    profile = read_profile(options.profile)
    trace = make_trace(options.window, options.hours * 3600, options.rate, options.gap, options.seed)
    morphing = MorphSettings(ladder=("w8", "w4"), ttft_slo_s=options.slo, interval_s=options.interval)
    policies = [
        Policy("static full", 0),
        Policy("static w8", profile.level_of("w8")),
        Policy("balanced", None, morphing),
    ]
    print(f"{len(trace)} requests in {trace.end_s:.0f} s")
    rows = []
    for servers in [*range(1, options.servers + 1), 0]:
        for policy in policies:
            began = time.process_time()
            found = Fleet(profile, policy, servers or 1, None if servers else ScalerSettings()).run(trace)
            row = {"servers": servers or "auto", **found.summary(options.slo), "cpu_s": time.process_time() - began}
            rows.append(row)
            print(
                f"{row['servers']!s:>5} {row['label']:12} GPU hours {row['gpu_hours']:5.2f} most {row['servers_most']} "
                f"p95 {row['ttft_s']['p95']:7.3f} s  late {row['slo_violation_share']:7.2%}  "
                f"full precision {row['full_precision_share']:6.1%}  {row['cpu_s']:.1f} s CPU",
                flush=True,
            )
    head = {
        "profile": profile.name, "window": options.window.name, "hours": options.hours, "rate_per_s": options.rate,
        "gap_s": options.gap, "seed": options.seed, "slo_s": options.slo, "requests": len(trace),
        "interval_s": options.interval, "rows": rows,
    }  # fmt: skip
    options.out.write_text(json.dumps(head, indent=1) + "\n")
    draw(head, options.out.with_suffix(".png"))


def make_trace(window: Path, seconds: float, rate: float, gap: float, seed: int) -> Arrivals:
    """Base load and bursts."""
    with window.open(newline="", encoding="utf-8") as file:
        rows = [(float(r["arrival_s"]), int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(file)]
    length = rows[-1][0]
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, round(1.2 * seconds * rate)))
    picked = rng.integers(0, len(rows), len(times))
    all_rows = [(float(t), *rows[i][1:]) for t, i in zip(times, picked, strict=True) if t < seconds]
    at = float(rng.exponential(gap))
    while at + length < seconds:
        every = int(rng.choice([1, 2, 3]))
        all_rows += [(at + t, prompt, output) for t, prompt, output in rows[::every]]
        at += length + float(rng.exponential(gap))
    all_rows.sort()
    arrivals, prompts, outputs = zip(*all_rows, strict=True)
    return Arrivals(np.array(arrivals), np.array(prompts), np.array(outputs), f"{window.name} repeated, seed {seed}")


def draw(head: dict[str, Any], path: Path) -> None:
    """Violations by number of servers, and the autoscaler's way."""
    figure = importlib.import_module("matplotlib.figure").Figure((10.0, 6.6), facecolor="white")
    above, below = figure.subplots(2, 1)
    figure.subplots_adjust(left=0.075, right=0.98, top=0.9, bottom=0.09, hspace=0.45)
    for label, colour in COLOURS.items():
        rows = [row for row in head["rows"] if row["label"] == label]
        fixed = [row for row in rows if row["servers"] != "auto"]
        late = [100 * row["slo_violation_share"] for row in fixed]
        above.plot([row["servers"] for row in fixed], late, marker="o", color=colour, label=label)
        (auto,) = (row for row in rows if row["servers"] == "auto")
        times, sizes = zip(*auto["sizes"], strict=True)
        name = f"{label}: {auto['gpu_hours']:.2f} GPU hours, {auto['slo_violation_share']:.1%} late"
        below.plot(
            [*times, head["hours"] * 3600], [*sizes, sizes[-1]], drawstyle="steps-post", color=colour, label=name
        )
    above.set_title(f"Requests with TTFT above {head['slo_s']:g} s, %, by number of servers", loc="left", fontsize=10.5)
    below.set_title("Servers under the autoscaler, over seconds", loc="left", fontsize=10.5)
    above.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(integer=True))
    for axis in (above, below):
        axis.grid(axis="y", color="#e3e7ec")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=9)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    title = f"{head['profile']}: {head['requests']} requests in {head['hours']:g} h, bursts of {head['window']}"
    figure.text(0.075, 0.955, title, fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
