"""Overload: many times the requests that the server can serve. Run from the repository's root:

    python bench/reliability/overload.py --times 20 --seconds 60 --json bench/reliability/results/overload.json

First as many clients as the engine has sequences ask in turn: what they get done is the peak. Then requests arrive
at `times` that rate, whatever becomes of them. Shown are goodput, rejections and how long one takes, the queue, the
level, resident memory, and how long the way back takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "triton")]

import tritonclient.grpc as grpcclient  # noqa: E402 - the helpers must be found first

from tests.chaos import check  # noqa: E402
from triton_server import TritonServer  # noqa: E402
from wire_client import pending, post, tensor, until  # noqa: E402

SEQUENCES = 16
TOKENS = 160
STREAMS = 4
PROMPTS = [f"{word} and the old man by the sea, once upon a time, {at}" for at, word in enumerate("abcdefgh" * 4)]


def body(at: int) -> dict[str, Any]:
    """Request number `at`, for HTTP."""
    return {"text_input": PROMPTS[at % len(PROMPTS)], "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}


def peak(server: TritonServer, seconds: float) -> float:
    """Requests per second that a full house of waiting clients gets done."""
    done: list[float] = []
    ends_s = time.monotonic() + seconds

    def client(number: int) -> None:
        at = number
        while time.monotonic() < ends_s:
            status, answer = post(server, body(at))
            assert status == 200, answer
            done.append(time.monotonic())
            at += SEQUENCES

    threads = [threading.Thread(target=client, args=(number,)) for number in range(SEQUENCES + 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begins_s = ends_s - seconds * 2 / 3  # the first third fills the engine
    return sum(begins_s <= at_s < ends_s for at_s in done) / (ends_s - begins_s)


class Flood:
    """Requests at a fixed rate over a few gRPC streams."""

    def __init__(self, server: TritonServer) -> None:
        self.served: list[float] = []
        self.refused: Counter[str] = Counter()
        self._clients = [grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc}") for _ in range(STREAMS)]
        for client in self._clients:
            client.start_stream(self._hear)
        self._inputs = []
        for at in range(len(PROMPTS)):
            sampling = json.dumps({k: v for k, v in body(at).items() if k != "text_input"})
            self._inputs.append([tensor("text_input", [PROMPTS[at]]), tensor("sampling_parameters", [sampling])])

    def run(self, rate: float, seconds: float) -> int:
        """Send for `seconds`; returns how many."""
        began, sent = time.monotonic(), 0
        while (now := time.monotonic() - began) < seconds:
            while sent < now * rate:
                self._clients[sent % STREAMS].async_stream_infer("morph", self._inputs[sent % len(PROMPTS)])
                sent += 1
            time.sleep(0.005)
        return sent

    def close(self) -> None:
        for client in self._clients:
            client.stop_stream()
            client.close()

    def _hear(self, result: Any, error: Any) -> None:
        if error is None:
            self.served.append(time.monotonic())
        else:
            self.refused[error.message()] += 1


class Samples(threading.Thread):
    """Once a second: the queue, the level, resident memory, and how long a request over HTTP takes to be refused."""

    def __init__(self, server: TritonServer) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.stop = threading.Event()
        self.pending: list[float] = []
        self.levels: list[float] = []
        self.resident: list[dict[str, int]] = []
        self.refusals_s: list[float] = []

    def run(self) -> None:
        while not self.stop.wait(1.0):
            self.pending.append(pending(self._server))
            self.levels.append(self._server.metric("morph_level"))
            self.resident.append(check.footprint(self._server).resident_mib)
            if self.pending[-1] >= 250:
                began = time.monotonic()
                if post(self._server, body(0))[0] == 503:
                    self.refusals_s.append(time.monotonic() - began)


def main() -> int:
    """Measure once and print, or write, the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overload-") as folder:
        environment = {"MORPH_MAX_NUM_SEQS": str(SEQUENCES), "MORPH_KV_TOKENS": "2048"}
        server = TritonServer(Path(folder), environment)
        try:
            figures = measure(server.wait_ready(120).wait_metrics(), given.times, given.seconds)
            figures["exit_status"] = server.stop()
        finally:
            server.stop()
    text = json.dumps(figures, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")
    return 0


def measure(server: TritonServer, times: float, seconds: float) -> dict[str, Any]:
    """The figures of one server."""
    best = peak(server, 24.0)
    check.wait_idle(server)
    before = check.footprint(server).resident_mib
    samples = Samples(server)
    samples.start()
    flood, began = Flood(server), time.monotonic()
    sent = flood.run(best * times, seconds)
    ends = time.monotonic()
    goodput = sum(began + seconds / 6 <= at < ends for at in flood.served) / (ends - began - seconds / 6)
    until(lambda: pending(server) == 0, 180.0, "an empty queue")
    drained = time.monotonic()
    until(lambda: server.metric("morph_level") == 0, 60.0, "level 0")
    back = time.monotonic()
    samples.stop.set()
    samples.join()
    until(lambda: len(flood.served) + flood.refused.total() == sent, 60.0, "an answer to each request")
    flood.close()
    check.wait_idle(server)
    return {
        "peak_requests_per_s": round(best, 2),
        "times": times,
        "seconds": seconds,
        "sent": sent,
        "served": len(flood.served),
        "refused": dict(flood.refused),
        "goodput_requests_per_s": round(goodput, 2),
        "goodput_of_peak": round(goodput / best, 3),
        "refusal_ms_median": round(statistics.median(samples.refusals_s) * 1e3, 1) if samples.refusals_s else None,
        "refusal_ms_max": round(max(samples.refusals_s) * 1e3, 1) if samples.refusals_s else None,
        "pending_max": max(samples.pending),
        "level_max": max(samples.levels),
        "empty_queue_after_s": round(drained - ends, 1),
        "level_0_after_empty_queue_s": round(back - drained, 1),
        "resident_mib_before": before,
        "resident_mib_max": {name: max(at[name] for at in samples.resident) for name in before},
        "resident_mib_after": check.footprint(server).resident_mib,
    }


if __name__ == "__main__":
    sys.exit(main())
