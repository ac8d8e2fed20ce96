"""Half an hour of steady Poisson load under the controller: `python bench/simulate/steady.py`.

At 0.6 of what full precision serves the level must never change, at 1.1 it may turn twice a minute. The queue's signal
is 200 ms late. Writes results/steady.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from morph_runtime.config import MorphSettings
from morph_runtime.simulate.arrivals import Arrivals, steady
from morph_runtime.simulate.engine_profile import EngineProfile, read_profile
from morph_runtime.simulate.pilot import SignalPath, quiet_controller
from morph_runtime.simulate.result import summary
from morph_runtime.simulate.scenario import Policy, simulate

HERE = Path(__file__).resolve().parent
LOADS = (("h200_llama-2-7b_24gib", 512, 256), ("h200_llama-3-8b_24gib", 2048, 32))
COUNT = 2000


def main() -> None:
    """Run all and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--share", type=float, action="append", help="of capacity; default: 0.6 and 1.1")
    options = parser.parse_args()
    quiet_controller()
    rows = []
    for name, prompt, output in LOADS:
        profile = read_profile(HERE / f"profiles/{name}.json")
        most = capacity(profile, prompt, output)
        for share in options.share or (0.6, 1.1):
            policy = Policy("balanced", None, MorphSettings(ladder=("w8", "w4")), SignalPath(delay_s=0.2))
            began = time.process_time()
            result = simulate(profile, steady(share * most, options.seconds, prompt, output, seed=1), policy)
            row = {
                "profile": name, "prompt": prompt, "output": output, "share": share, "rate_per_s": share * most,
                "seconds": options.seconds, **summary(result, 2.0), "cpu_s": time.process_time() - began,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{name} {share:g}: {row['level_changes']} changes, {row['most_reversals_per_minute']} reversals a "
                f"minute at most, full precision {row['full_precision_share']:.1%}, p95 {row['ttft_s']['p95']:.2f} s, "
                f"{row['cpu_s']:.1f} s CPU",
                flush=True,
            )
    if not options.share:
        (HERE / "results/steady.json").write_text(json.dumps(rows, indent=1) + "\n")


def capacity(profile: EngineProfile, prompt: int, output: int) -> float:
    """Requests per second that full precision serves when there is always more to do."""
    ones = np.ones(COUNT, dtype=np.int64)
    rush = simulate(profile, Arrivals(np.zeros(COUNT), prompt * ones, output * ones), Policy("full", 0))
    ends = np.sort(rush.e2e_s)
    return 0.8 * COUNT / float(ends[9 * COUNT // 10] - ends[COUNT // 10])


if __name__ == "__main__":
    main()
