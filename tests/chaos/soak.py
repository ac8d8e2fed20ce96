"""`python -m tests.chaos.soak --minutes 90`: a long time under load, and whether anything grows.

Two servers get the same requests: the product, and Triton with a model that only echoes (`echo/model.py`). Arrivals
follow a Poisson process at a share of the measured capacity, with a burst in each minute, so that layers shift.
Every few minutes the load pauses; once everything is idle, memory, threads and descriptors are sampled, so that all
samples are of the same state. tritonserver's own growth is judged against that of the echo server.

With `--heap` it is told what of each process's memory is in use (`heap.py`): this must not grow, neither in a shorter
run, and needs no echo server beside it (`--alone`).
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "triton")]

from tests.chaos import check, plan, storm, streams  # noqa: E402 - the test helpers must be found first
from tests.chaos.heap import HeapProbe  # noqa: E402
from tests.chaos.slopes import Sample, sample, slope_per_hour  # noqa: E402
from triton_server import TritonServer, real_repository  # noqa: E402

SEQUENCES = 16
CLIENTS = 40
MAX_TOKENS = 180
PATIENCE_S = 120.0
BURST = (45.0, 0.7, 1.9)
"""Seconds of calm in each minute, and the share of the mean rate in calm and in the burst after it: 0.75 * 0.7 +
0.25 * 1.9 = 1."""
MOST_PER_HOUR = 1.0
"""MB by which a process may grow."""


@dataclass(frozen=True)
class Course:
    """How long, how hard.

    Attributes:
        seed: fixes the requests and the spaces between them.
        minutes: of the whole run, warm-up included.
        warm_up: minutes whose samples do not count.
        load: share of capacity.
        calm_every_s: seconds of load between samples.
        heap: whether samples tell what is in use.
        alone: whether the echo server is left out.
    """

    seed: int
    minutes: float
    warm_up: float
    load: float
    calm_every_s: float
    heap: bool = False
    alone: bool = False


class Crowd:
    """A fixed number of clients of one server that take requests from a line."""

    def __init__(self, server: TritonServer, clients: int) -> None:
        self._server = server
        self._line: queue.Queue[plan.Ask] = queue.Queue()
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        for _ in range(clients):
            threading.Thread(target=self._live, daemon=True).start()

    @property
    def waiting(self) -> int:
        return self._line.qsize()

    def take(self, ask: plan.Ask) -> None:
        self._line.put(ask)

    def wait(self) -> None:
        """Until every request has ended."""
        self._line.join()

    def _live(self) -> None:
        while True:
            ask = self._line.get()
            seen = streams.run(self._server, ask, PATIENCE_S)
            with self._lock:
                self.counts["ended"] += not seen.left
                self.counts["left"] += seen.left
                self.counts["responses"] += len(seen.pieces)
                self.counts["tokens"] += seen.tokens
                self.counts["at a deeper level"] += any(map(any, seen.levels))
                if fault := fault_of(seen):
                    self.wrong.append(fault)
            self._line.task_done()


def fault_of(seen: streams.Seen) -> str:
    """What is wrong with a stream whose text nobody knows beforehand; empty if nothing is."""
    name = f"{seen.ask.way}, {plan.PROMPTS[seen.ask.prompt]!r}, {seen.ask.sampling}"
    if seen.hung:
        return f"hung: {name}"
    if seen.error:
        return f"error: {name}: {seen.error}"
    if seen.left:
        return ""
    if seen.ends != 1:
        return f"{seen.ends} ends: {name}"
    if "stop" not in seen.ask.sampling and seen.tokens != seen.ask.sampling["max_tokens"]:
        return f"{seen.tokens} tokens: {name}"
    return ""


@dataclass
class Findings:
    """What was found.

    Attributes:
        capacity: requests per second that the product served with all clients busy.
        samples: of each process, at moments of calm.
        held_back: arrivals that were left out, for the server (or the machine) was behind.
    """

    course: Course
    capacity: float = 0.0
    samples: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    held_back: int = 0
    shifts: int = 0
    complaints: list[str] = field(default_factory=list)

    def slopes(self) -> dict[str, dict[str, float]]:
        """MB per hour of each process after the warm-up, and how far threads and descriptors are apart."""
        found = {}
        for name, samples in self.samples.items():
            late = [at for at in samples if at.at_s >= self.course.warm_up * 60] or samples[-2:]
            times = [at.at_s for at in late]
            kinds = ("resident", "anonymous", "in_use") if self.course.heap else ("resident", "anonymous")
            found[name] = {
                what: round(slope_per_hour(times, [getattr(at, what) for at in late]), 2) for what in kinds
            } | {
                f"{what}_spread": max(getattr(at, what) for at in late) - min(getattr(at, what) for at in late)
                for what in ("threads", "descriptors")
            }
        return found

    def judge(self) -> None:
        """Add what is over the bar to the complaints."""
        slopes = self.slopes()
        kind = "in_use" if self.course.heap else "resident"
        growth = {name: slopes[name][kind] for name in ("stub", "engine", "server")}
        if "echo server" in slopes:
            beyond = growth.pop("server") - slopes["echo server"][kind]
            growth["server, beyond the echo server"] = beyond
        for name, per_hour in growth.items():
            if per_hour > MOST_PER_HOUR:
                self.complaints.append(f"{name} grows by {per_hour:.2f} MB/h")
        for name in ("stub", "engine", "server"):
            for what in ("threads", "descriptors"):
                if slopes[name][f"{what}_spread"] > 2:
                    counts = [getattr(at, what) for at in self.samples[name]]
                    self.complaints.append(f"{what} of {name}: {counts}")

    def as_json(self) -> dict[str, Any]:
        course = asdict(self.course)
        samples = {name: [asdict(at) for at in each] for name, each in self.samples.items()}
        rest = {"shifts": self.shifts, "complaints": self.complaints, "samples": samples}
        return {
            **course, "capacity_requests_per_s": round(self.capacity, 2), "held_back": self.held_back,
            **self.counts, "slopes_mb_per_h": self.slopes(), **rest,
        }  # fmt: skip


def soak(course: Course, folder: Path) -> Findings:
    """Run both servers through it."""
    found = Findings(course)
    (folder / "product").mkdir()
    (folder / "echo").mkdir()
    settings = {"MORPH_MAX_NUM_SEQS": str(SEQUENCES), "MORPH_KV_TOKENS": "2048", "MORPH_MODE": "performance"}
    probe = None
    if course.heap:
        (folder / "heap").mkdir()
        probe = HeapProbe(folder / "heap")
        settings |= probe.environment
    servers = {"product": TritonServer(folder / "product", settings)}
    product = servers["product"]
    if not course.alone:
        repository = {"MORPH_MODEL_REPOSITORY": str(_echo_repository(folder / "repository"))}
        servers["echo"] = TritonServer(folder / "echo", (probe.environment if probe else {}) | repository)
    try:
        for server in servers.values():
            server.wait_ready(180)
        product.wait_metrics(30)
        _run(found, servers, probe)
        if product.metric("morph_engine_restarts_total") or product.metric("morph_backend_errors_total"):
            found.complaints.append(f"restarts or defects: {product.output()[-2000:]}")
        found.shifts = int(product.metric("morph_shifts_total"))
        if product.stop() != 0:
            found.complaints.append(f"exit status {product.process.returncode}")
        found.judge()
    finally:
        for server in servers.values():
            server.stop()
    return found


def _echo_repository(folder: Path) -> Path:
    real_repository(folder)
    shutil.copy(Path(__file__).parent / "echo" / "model.py", folder / "morph" / "1" / "model.py")
    return folder


def _run(found: Findings, servers: dict[str, TritonServer], probe: HeapProbe | None) -> None:
    course = found.course
    asks = plan.asks(course.seed, MAX_TOKENS)
    crowds = {name: Crowd(server, CLIENTS) for name, server in servers.items()}
    began = time.monotonic()
    found.capacity = _capacity(crowds, asks, 20.0 if course.minutes > 5 else 6.0)
    dice = random.Random(f"soak {course.seed}")
    while True:
        _calm(found, crowds, servers, probe, began)
        left_s = course.minutes * 60 - (time.monotonic() - began)
        if left_s <= 0:
            break
        _load(found, crowds, asks, dice, began, min(course.calm_every_s, left_s))
    for name, crowd in crowds.items():
        found.counts[name] = dict(crowd.counts)
        found.complaints += crowd.wrong


def _capacity(crowds: dict[str, Crowd], asks: Any, seconds: float) -> float:
    """Requests per second with as many clients as there is room for; the echo server gets the same."""
    began = time.monotonic()
    while (took := time.monotonic() - began) < seconds:
        for crowd in crowds.values():
            while crowd.waiting < 2:
                crowd.take(next(asks))
        time.sleep(0.02)
    return (
        crowds["product"].counts.total()
        and (crowds["product"].counts["ended"] + crowds["product"].counts["left"]) / took
    )


def _load(
    found: Findings, crowds: dict[str, Crowd], asks: Any, dice: random.Random, began: float, seconds: float
) -> None:
    """Requests at random times, more of them in the burst that ends each minute."""
    rate = found.course.load * found.capacity
    ends = time.monotonic() + seconds
    while (now := time.monotonic()) < ends:
        calm_s, calm, burst = BURST
        share = calm if (now - began) % 60.0 < calm_s else burst
        time.sleep(dice.expovariate(rate * share))
        ask = next(asks)
        if crowds["product"].waiting >= CLIENTS:
            found.held_back += 1
            continue
        for crowd in crowds.values():
            crowd.take(ask)


def _calm(
    found: Findings, crowds: dict[str, Crowd], servers: dict[str, TritonServer], probe: HeapProbe | None, began: float
) -> None:
    """Wait until nothing is open anywhere, and take a sample of each process."""
    for crowd in crowds.values():
        crowd.wait()
    check.wait_idle(servers["product"])
    time.sleep(1.0)  # closed connections and ended threads take a moment to be gone
    at_s = time.monotonic() - began
    pids = check.processes(servers["product"])
    if "echo" in servers:
        pids |= {f"echo {name}": pid for name, pid in check.processes(servers["echo"]).items()}
    line = []
    for name, pid in sorted(pids.items()):
        taken = sample(pid, at_s, probe.in_use_mb(pid) if probe else None)
        found.samples[name].append(taken)
        heap = f" {taken.in_use:.2f} in use" if taken.in_use is not None else ""
        line.append(f"{name} {taken.resident:.1f} MB{heap} {taken.threads} threads {taken.descriptors} fds")
    counts = crowds["product"].counts
    print(f"{at_s:6.0f} s, {counts['ended'] + counts['left']} requests: {', '.join(line)}", flush=True)


def main() -> int:
    """Run once; exit status 1 if anything has grown or gone wrong."""
    parser = argparse.ArgumentParser(prog="tests.chaos.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--warm-up", type=float, default=30.0, help="minutes whose samples do not count")
    parser.add_argument("--load", type=float, default=0.7, help="share of the measured capacity")
    parser.add_argument("--calm-every", type=float, default=150.0, help="seconds of load between samples")
    parser.add_argument("--heap", action="store_true", help="judge what is in use; needs a C compiler")
    parser.add_argument("--alone", action="store_true", help="without the echo server")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    seed = storm.any_seed() if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    course = Course(seed, given.minutes, given.warm_up, given.load, given.calm_every, given.heap, given.alone)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = soak(course, Path(folder))
    answer = found.as_json()
    if given.json is not None:
        given.json.write_text(json.dumps(answer, indent=1) + "\n")
    print(json.dumps({name: value for name, value in answer.items() if name != "samples"}, indent=1))
    print("good" if not found.complaints else "BAD")
    return 1 if found.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
