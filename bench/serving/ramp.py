"""A burst of streams through Triton into an engine that costs nothing: what queue, serving process and gRPC take.

    python bench/serving/ramp.py [--streams 64] [--tokens 300] [--step-ms 6] [--clients 1] [--repeat 3] [--instances 1]
                                 [--json FILE]

The engine is the tests' own: a step takes `--step-ms`, whatever is in it, and gives each stream a token. All streams
are asked for at the same moment, by so many client processes. Prints a line per burst: the figures of the job `streams`
(`streams.py`), and processor seconds of Triton and of its stub.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import psutil
from served import Target
from streams import Workers, figures

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "triton")]

from tiny_model import write_tiny_model  # noqa: E402
from triton_server import TritonServer, fake_repository  # noqa: E402

PROMPT_TOKENS = 8
CONTEXT = 512
"""Of the tests' engine."""


def cpu_seconds(server: TritonServer) -> dict[str, float]:
    """Processor time of the launcher's children so far, by name."""
    spent: dict[str, float] = {}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        times = process.cpu_times()
        spent[process.name()] = spent.get(process.name(), 0.0) + times.user + times.system
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=300, help="of each stream; at most 480")
    parser.add_argument("--step-ms", type=float, default=6.0)
    parser.add_argument("--clients", type=int, default=1, help="client processes")
    parser.add_argument("--instances", type=int, default=1, help="serving processes of the model")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        folder = write_tiny_model(room / "model")
        environment = {
            "MORPH_MODEL": str(folder), "FAKE_STEP_MS": f"{given.step_ms:g}",
            "MORPH_MODEL_REPOSITORY": str(fake_repository(room / "repository", instances=given.instances)),
            "MORPH_MAX_NUM_SEQS": "256",
        }  # fmt: skip
        server = TritonServer(room, environment)
        try:
            server.wait_ready().wait_metrics()
            target = Target("cpu", str(folder), 0.0, CONTEXT, 256, 0)
            workers = Workers(given.clients, f"127.0.0.1:{server.grpc}", target, folder)
            workers.batch(given.clients, PROMPT_TOKENS, 8)  # the first streams of all
            for _ in range(given.repeat):
                before = cpu_seconds(server)
                row = figures(*workers.batch(given.streams, PROMPT_TOKENS, given.tokens))
                row |= {f"{who}_cpu_s": now - before[who] for who, now in cpu_seconds(server).items()}
                found.append({figure: round(value, 2) for figure, value in row.items()})
                print(found[-1], flush=True)
            workers.close()
        finally:
            server.stop()
    if given.json is not None:
        given.json.write_text(json.dumps({"settings": vars(given), "bursts": found}, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
