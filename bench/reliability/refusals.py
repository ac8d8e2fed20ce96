"""Refused requests on gRPC streams, as many as go: does tritonserver live?

    python bench/reliability/refusals.py --seconds 25 --ways plain status --json RESULT.json

Each request is a stream of its own with an impossible `max_tokens`; the engine is the one of the tests.
`plain`: the error comes as words on the stream, and the client reads to the stream's end. `status`: the client has
the header `triton_grpc_error`, so Triton ends the stream with a gRPC status. `leave`: as `plain`, but the client
cancels as soon as it has the error. A server that ends is a finding, not an error: the exit status is 0, and its
last words are in the result.
"""

from __future__ import annotations

import argparse
import json
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

WAYS = ("plain", "status", "leave")
WORDS = ("Triton has died", "ASSERTION", "misuse")


def client(server: TritonServer, way: str, over: threading.Event, seen: Counter[str]) -> None:
    """Ask for the impossible until it is over, or the server is gone."""
    headers = (("triton_grpc_error", "true"),) if way == "status" else ()
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while not over.is_set():
            call = stub.ModelStreamInfer(
                iter([stream_request("hello world", {"max_tokens": -5})]), metadata=headers, timeout=20
            )
            try:
                for answer in call:
                    seen["refused"] += bool(answer.error_message)
                    if way == "leave":
                        call.cancel()
            except grpc.RpcError as error:
                code = error.code()
                refused = way == "status" and code is grpc.StatusCode.INVALID_ARGUMENT
                seen["refused" if refused else code.name] += 1
                if code is grpc.StatusCode.UNAVAILABLE:
                    over.set()


def run(way: str, seconds: float, clients: int) -> dict[str, Any]:
    """One server, until the time is over or the server is gone."""
    seen: Counter[str] = Counter()
    over = threading.Event()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            "MORPH_MODEL": str(write_tiny_model(folder / "model")),
            "MORPH_MODEL_REPOSITORY": str(fake_repository(folder / "repository")),
        }
        server = TritonServer(folder, settings)
        try:
            server.wait_ready(120).wait_metrics()
            began = time.monotonic()
            threads = [threading.Thread(target=client, args=(server, way, over, seen)) for _ in range(clients)]
            for thread in threads:
                thread.start()
            over.wait(seconds)
            lived_s = time.monotonic() - began
            over.set()
            for thread in threads:
                thread.join()
        finally:
            status = server.stop()
        words = [line for line in server.output().splitlines() if any(word in line for word in WORDS)]
    return {"way": way, "clients": clients, "seconds": round(lived_s, 1), **seen, "status": status, "last_words": words}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    for _ in range(given.runs):
        for way in given.ways:
            found.append(run(way, given.seconds, given.clients))
            print(found[-1], flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
