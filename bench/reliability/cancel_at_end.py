"""Clients that cancel their streams in the milliseconds in which these end by themselves: does tritonserver live?

    python bench/reliability/cancel_at_end.py --seconds 12 --runs 5 --step-ms 1 --json RESULT.json

The engine is the one of the tests, with a token for each stream every so many milliseconds, so that ends come often.
With `--early` the streams are long and cancelled in full flow, for comparison. A server that ends is a finding, not an
error: the exit status is 0, and its last words are in the result.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "triton")]

from slow_client import stream_request  # noqa: E402 - the helpers must be found first
from tiny_model import write_tiny_model  # noqa: E402
from triton_server import TritonServer, fake_repository  # noqa: E402

TOKENS = 6
LONG = 400
WORDS = ("Triton has died", "ASSERTION", "misuse")
JITTER = 5
"""Tokens' time over which the moment of the cancellation is spread, from three before the last one on."""


def client(
    server: TritonServer, seed: int, step_s: float, early: bool, over: threading.Event, seen: Counter[str]
) -> None:
    """Ask and cancel until it is over, or the server is gone."""
    chance = random.Random(seed)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while not over.is_set():
            requests: queue.Queue[Any] = queue.Queue()
            requests.put(stream_request("hello world", {"max_tokens": LONG if early else TOKENS, "ignore_eos": True}))
            call = stub.ModelStreamInfer(iter(requests.get, None))
            try:
                next(call)
                over.wait((TOKENS - 3 + JITTER * chance.random()) * step_s)
                call.cancel()
                seen["cancelled"] += 1
            except grpc.RpcError as error:
                seen[error.code().name] += 1
                if server.process.poll() is not None:
                    over.set()
            requests.put(None)


def run(seconds: float, clients: int, step_ms: float, early: bool) -> dict[str, Any]:
    """One server, until the time is over or the server is gone."""
    seen: Counter[str] = Counter()
    over = threading.Event()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = TritonServer(
            folder,
            {
                "MORPH_MODEL": str(write_tiny_model(folder / "model")),
                "MORPH_MODEL_REPOSITORY": str(fake_repository(folder / "repository")),
                "MORPH_MAX_NUM_SEQS": "64",
                "FAKE_STEP_MS": f"{step_ms:g}",
            },
        )
        try:
            server.wait_ready(120).wait_metrics()
            began = time.monotonic()
            threads = [
                threading.Thread(target=client, args=(server, seed, step_ms / 1e3, early, over, seen), daemon=True)
                for seed in range(clients)
            ]
            for thread in threads:
                thread.start()
            over.wait(seconds)
            lived_s = time.monotonic() - began
            over.set()
            ends_s = time.monotonic() + 10
            for thread in threads:
                thread.join(max(0.0, ends_s - time.monotonic()))
            hung = sum(thread.is_alive() for thread in threads)
        finally:
            status = server.stop()
        crashed = lived_s < seconds or status != 0
        words = [line for line in server.output().splitlines() if any(word in line for word in WORDS)]
    return {
        "clients": clients, "step_ms": step_ms, "early": early, "seconds": round(lived_s, 1), **seen,
        "hung": hung, "crashed": crashed, "launcher_status": status, "last_words": words,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--step-ms", type=float, default=4.0)
    parser.add_argument("--early", action="store_true", help="cancel long streams in full flow")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    for _ in range(given.runs):
        found.append(run(given.seconds, given.clients, given.step_ms, given.early))
        print(found[-1], flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
