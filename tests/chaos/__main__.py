"""`python -m tests.chaos --seed N --seconds S`: a real server, a storm, and a verdict. Exit status 1 if it is bad."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "triton")]

import false_clock  # noqa: E402 - the test helpers must be found first
from tests.chaos import plan, storm  # noqa: E402

LEVELS = {"fixed": ("fixed",), "free": ("free",), "both": ("free", "fixed")}


def main() -> int:
    """One storm for each seed, each with a server of its own; the seed is printed first, to run a failure again."""
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--seed", default="", help="fixes requests, bursts and faults; several: 1,2,3")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each storm")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults; 0: none")
    parser.add_argument(
        "--faults", default=",".join(plan.FAULTS), help="comma-separated, of: " + ", ".join(plan.FAULTS)
    )
    parser.add_argument("--levels", choices=LEVELS, default="fixed", help="both: in turns, free first")
    parser.add_argument("--clock", action="store_true", help="set the server's wall clock at random; needs libfaketime")
    parser.add_argument("--max-tokens", type=int, default=180)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="the engine's")
    parser.add_argument("--instances", type=int, default=1, help="serving processes of the model")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    if given.clock and false_clock.library() is None:
        parser.error(f"--clock: {false_clock.MISSING}.")
    try:
        seeds = [int(seed) for seed in given.seed.split(",")] if given.seed else [storm.any_seed()]
    except ValueError:
        parser.error(f"--seed: must be whole numbers with commas between them, but is '{given.seed}'.")
    found: list[dict[str, Any]] = []
    good = True
    for at, seed in enumerate(seeds):
        print(f"seed {seed}", flush=True)
        levels = LEVELS[given.levels][at % len(LEVELS[given.levels])]
        report = run(
            storm.Weather(
                seed, given.seconds, given.every, tuple(given.faults.split(",")), levels, given.max_tokens,
                clock=given.clock, device=given.device, instances=given.instances,
            )
        )  # fmt: skip
        found.append(report.as_json())
        good = good and report.good
        if given.json is not None:  # after each, so that what has been done is not lost
            given.json.write_text(json.dumps(found if len(seeds) > 1 else found[0], indent=1) + "\n")
        print("good" if report.good else "BAD", flush=True)
    return 0 if good else 1


def run(weather: storm.Weather) -> storm.Report:
    """One storm; what came of it is printed."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            report = storm.storm(weather, Path(folder))
        except BaseException:  # such as a server that has died: its last words would go with the folder
            print((Path(folder) / "launcher.log").read_text()[-8000:], flush=True)
            raise
        print(*report.lines(), sep="\n", flush=True)
        if not report.good:
            print((Path(folder) / "launcher.log").read_text()[-4000:])
    return report


if __name__ == "__main__":
    sys.exit(main())
