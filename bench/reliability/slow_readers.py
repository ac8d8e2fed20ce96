"""Clients that do not read: what the others notice, and what it costs the server. Run from the repository's root:

    python bench/reliability/slow_readers.py --json bench/reliability/results/slow_readers.json

Half of the sequences belong to clients that read, over gRPC; the other half to clients that read as well, and in
further runs to clients that stop after their first response, over gRPC or SSE. The slow ones ask for the most that a
response can hold (20 log probabilities per token). Shown are the tokens per second of the readers, how much
tritonserver and the serving process grow with each unread token, and what is left when the clients have gone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "triton")]

from slow_client import SlowGrpc, SlowSse  # noqa: E402 - the helpers must be found first
from tests.chaos import check  # noqa: E402
from tests.chaos.slopes import sample  # noqa: E402
from triton_server import TritonServer  # noqa: E402
from wire_client import until  # noqa: E402

READERS = 4
SLOW = 4
TOKENS = 500
ROUNDS = 2
MUCH = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "logprobs": 20}


def memory(server: TritonServer) -> dict[str, float]:
    """MB resident of tritonserver and the serving process."""
    pids = check.processes(server)
    return {name: round(sample(pids[name], 0.0).resident, 1) for name in ("server", "stub")}


class Readers:
    """Clients that read all they get; their tokens are counted."""

    def __init__(self, server: TritonServer, count: int) -> None:
        self.tokens = 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(server,)) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _read(self, server: TritonServer) -> None:
        client = SlowGrpc(server)
        while not self._over.is_set():
            client.ask("The sea", MUCH)
            for response in client.rest():
                self.tokens += response["tokens"]
                if self._over.is_set():
                    break
        client.close()


def run(server: TritonServer, kind: type[SlowGrpc | SlowSse] | None) -> dict[str, Any]:
    """One run; without `kind` all clients read."""
    check.wait_idle(server)
    before = memory(server)
    readers, others = Readers(server, READERS), Readers(server, SLOW if kind is None else 0)
    slow: list[SlowGrpc | SlowSse] = []
    began, at_first = time.monotonic(), readers.tokens
    held = []
    for _ in range(ROUNDS):
        done = server.metric("vllm:generation_tokens_total")
        if kind is not None:
            new = [kind(server) for _ in range(SLOW)]
            for client in new:
                client.ask("Once upon a time", MUCH)
                client.read()
            slow += new
        enough = server.metric("morph_requests_total", outcome="length") + READERS + SLOW
        until(
            lambda enough=enough: server.metric("morph_requests_total", outcome="length") >= enough, 600.0, "the ends"
        )
        held.append({**memory(server), "tokens": server.metric("vllm:generation_tokens_total") - done})
    rate = (readers.tokens - at_first) / (time.monotonic() - began)
    for group in (readers, others):
        group.close()
    check.wait_idle(server)
    unread = memory(server)
    for client in slow:
        client.close()
    time.sleep(3.0)
    check.wait_idle(server)
    return {
        "readers_tokens_per_s": round(rate, 1), "slow_streams": len(slow), "mb_before": before, "mb_by_round": held,
        "mb_with_unread_streams": unread, "mb_after_they_left": memory(server),
    }  # fmt: skip


def main() -> int:
    """Measure once and print, or write, the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slow-") as folder:
        environment = {"MORPH_MAX_NUM_SEQS": str(READERS + SLOW), "MORPH_KV_TOKENS": "16384", "MORPH_MODE": "off"}
        server = TritonServer(Path(folder), environment)
        try:
            server.wait_ready(120).wait_metrics()
            run(server, None)  # what is made at first use
            kinds = {"all read": None, "slow over gRPC": SlowGrpc, "slow over SSE": SlowSse}
            figures = {name: run(server, kind) for name, kind in kinds.items()}
        finally:
            server.stop()
    text = json.dumps({"tokens_per_slow_stream": TOKENS, **figures}, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
