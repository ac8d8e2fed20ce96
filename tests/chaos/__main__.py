"""`python -m tests.chaos --seed N --seconds S`: a real server, a storm, and a verdict. Exit status 1 if it is bad."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "triton")]

import false_clock  # noqa: E402 - the test helpers must be found first
from tests.chaos import plan, storm  # noqa: E402


def main() -> int:
    """Run once; the seed is printed first, so that a failure can be run again."""
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="fixes requests, bursts and faults")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults; 0: none")
    parser.add_argument(
        "--faults", default=",".join(plan.FAULTS), help="comma-separated, of: " + ", ".join(plan.FAULTS)
    )
    parser.add_argument("--levels", choices=("fixed", "free"), default="fixed")
    parser.add_argument("--clock", action="store_true", help="set the server's wall clock at random; needs libfaketime")
    parser.add_argument("--max-tokens", type=int, default=180)
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    if given.clock and false_clock.library() is None:
        parser.error(f"--clock: {false_clock.MISSING}.")
    seed = storm.any_seed() if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    weather = storm.Weather(
        seed, given.seconds, given.every, tuple(given.faults.split(",")), given.levels, given.max_tokens,
        clock=given.clock,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            report = storm.storm(weather, Path(folder))
        except BaseException:  # such as a server that has died: its last words would go with the folder
            print((Path(folder) / "launcher.log").read_text()[-8000:], flush=True)
            raise
        print(*report.lines(), sep="\n", flush=True)
        if not report.good:
            print((Path(folder) / "launcher.log").read_text()[-4000:])
    if given.json is not None:
        given.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    print("good" if report.good else "BAD")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
