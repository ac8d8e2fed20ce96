"""One run: clients that come and go, things done to the server, and what is found afterwards."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import false_clock
from tests.chaos import check, plan, streams, wind
from tests.chaos.descriptors import GONE
from tests.chaos.replay import Replayer
from triton_server import ROOT, TritonServer, real_repository

MOST_CLIENTS = 10


@dataclass(frozen=True)
class Weather:
    """How a run is to be.

    Attributes:
        seed: fixes requests, bursts and faults.
        seconds: for which new requests come.
        every_s: between faults; 0: none.
        faults: which ones.
        levels: `fixed` (full precision) or `free` (little KV cache, so that bursts bring shifts).
        max_tokens: of the longest requests.
        silence_s: after which a stopped engine counts as wedged.
        clock: set the server's wall clock at random, as often as there are faults; needs libfaketime.
        device: the engine's, `cpu` or `cuda`; what a GPU has computed is computed again on the CPU.
        instances: serving processes of the model.
    """

    seed: int
    seconds: float
    every_s: float = 5.0
    faults: tuple[str, ...] = plan.FAULTS
    levels: str = "fixed"
    max_tokens: int = 180
    silence_s: int = 4
    clock: bool = False
    device: str = "cpu"
    instances: int = 1


@dataclass
class Report:
    """What came of it."""

    weather: Weather
    verdict: check.Verdict = field(default_factory=check.Verdict)
    done: list[str] = field(default_factory=list)  # faults
    pauses_s: list[float] = field(default_factory=list)  # of streams that were open when an engine ended
    longest_s: float = 0.0  # of a request that its client saw through
    restarts: int = 0
    ended_engines: int = 0  # by us; one that is ended while it starts is not counted as restarted
    own_faults_s: list[float] = field(default_factory=list)  # when it looked like an engine's own fault
    shifts: int = 0
    start_s: float = 0.0
    complaints: list[str] = field(default_factory=list)
    before: check.Footprint | None = None
    after: check.Footprint | None = None

    @property
    def good(self) -> bool:
        return not self.verdict.wrong and not self.complaints

    def note_end(self, at_s: float, *, own_fault: bool) -> None:
        """We have ended an engine; `own_fault`: in a way that looks like its own."""
        self.ended_engines += 1
        if own_fault:
            self.own_faults_s.append(at_s)

    def lines(self) -> Iterator[str]:
        verdict = self.verdict
        yield f"seed {self.weather.seed}, {self.weather.seconds:g} s, levels {self.weather.levels}"
        yield (
            f"streams: {verdict.ended} ended, {verdict.left} left by their client, {len(verdict.wrong)} wrong; "
            f"{len(verdict.shifted)} saw quantized layers ({verdict.replayed} of their tokens computed again), "
            f"{verdict.ties} near ties, "
            f"{verdict.blamed} blamed for two faults in a row"
        )
        yield f"faults: {', '.join(f'{self.done.count(what)} x {what}' for what in sorted(set(self.done))) or 'none'}"
        yield f"engine: {self.restarts} restarts, {self.shifts} shifts, first start {self.start_s:.1f} s"
        if self.pauses_s:
            p95 = statistics.quantiles(self.pauses_s, n=20)[-1] if len(self.pauses_s) > 1 else self.pauses_s[0]
            median = statistics.median(self.pauses_s)
            yield f"pause of {len(self.pauses_s)} streams over an engine's end: median {median:.1f} s, p95 {p95:.1f} s"
        yield f"longest request: {self.longest_s:.1f} s"
        yield f"before: {self.before}"
        yield f"after:  {self.after}"
        yield from verdict.wrong[:20]
        yield from self.complaints

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.weather.seed, "seconds": self.weather.seconds, "levels": self.weather.levels,
            "device": self.weather.device, "instances": self.weather.instances,
            "streams": self.verdict.ended, "left": self.verdict.left,
            "wrong": len(self.verdict.wrong),
            "shifted": len(self.verdict.shifted), "replayed_tokens": self.verdict.replayed,
            "near_ties": self.verdict.ties, "blamed": self.verdict.blamed,
            "faults": {w: self.done.count(w) for w in sorted(set(self.done))},
            "restarts": self.restarts, "shifts": self.shifts, "start_s": round(self.start_s, 2),
            "longest_s": round(self.longest_s, 2),
            "pauses_s": sorted(round(p, 2) for p in self.pauses_s), "complaints": self.complaints,
            "before": str(self.before), "after": str(self.after),
        }  # fmt: skip


def storm(weather: Weather, folder: Path) -> Report:
    """Run a server in `folder` through it."""
    engine: dict[str, Any] = {"memory": {"kv_tokens": 8192 if weather.levels == "fixed" else 1024}}
    engine["cache"] = {"reuse": "exact"}
    repository = real_repository(
        folder / "repository",
        engine,
        instances=weather.instances,
        ENGINE_SILENCE_SECONDS=str(weather.silence_s),
        MAX_REQUEST_SECONDS="240",
    )
    environment = {
        "MORPH_MODEL_REPOSITORY": str(repository),
        "MORPH_DTYPE": "float32",
        "MORPH_DEVICE": weather.device,
        "MORPH_MODE": "off" if weather.levels == "fixed" else "performance",
        "MORPH_MAX_NUM_SEQS": "16",
    }
    clock = None
    if weather.clock:
        preload = false_clock.library()
        assert preload is not None, false_clock.MISSING
        clock = false_clock.FalseClock(folder, preload)
        environment |= clock.environment
    began = time.monotonic()
    server = TritonServer(folder, environment)
    report = Report(weather)
    try:
        server.wait_ready(300 if weather.device == "cuda" else 120).wait_metrics()  # kernels are compiled first
        report.start_s = time.monotonic() - began
        _run(server, weather, report, clock)
        if server.stop() != 0:
            report.complaints.append(f"the launcher's exit status is {server.process.returncode}")
        if left := [*server.family(), *server.shared_memory()]:
            report.complaints.append(f"left behind: {left}")
    finally:
        server.stop()
    if report.verdict.shifted:
        report.verdict.replay(Replayer.of_model(ROOT / "models" / "morph-demo", weather.device))
    return report


def _run(server: TritonServer, weather: Weather, report: Report, clock: false_clock.FalseClock | None) -> None:
    known = check.references(server, weather.max_tokens)
    asks = [plan.Ask(0, plan.samplings(9)[0], way, 2) for way in sorted(set(plan.WAYS))]
    with ThreadPoolExecutor(3 * MOST_CLIENTS) as crowd:
        # So that whatever is made at first use is there: one after the other, and with a backlog in Triton's queue.
        for ask in asks:
            streams.run(server, ask, 30.0)
        list(crowd.map(lambda ask: streams.run(server, ask, 30.0), asks * MOST_CLIENTS))
    check.wait_idle(server)
    report.before = check.footprint(server)
    calm_restarts = int(server.metric("morph_engine_restarts_total"))
    if calm_restarts > server.output().count("the engine has not answered"):  # the machine may be busy, too
        report.complaints.append("an engine has ended before the storm")
    seen: list[streams.Seen] = []
    over = threading.Event()
    clients = Clients(server, weather, seen)
    ends_s: list[float] = []
    faults = threading.Thread(target=wind.blow, args=(server, clock, report, ends_s, over), daemon=True)
    faults.start()
    clients.run()
    faults.join(60)
    over.set()
    for each in seen:
        report.verdict.judge(each, known[each.ask.reference], report.own_faults_s)
    report.pauses_s = [
        pause for each in seen for end_s in ends_s if (pause := each.longest_pause_s(end_s)) is not None
        and each.ask.way != "generate"
    ]  # fmt: skip
    report.longest_s = max((each.ended_s - each.began_s for each in seen if not each.left), default=0.0)
    check.wait_idle(server)
    report.after = check.footprint(server)
    report.complaints += compare(report.before, report.after, weather.clock)
    report.restarts = int(server.metric("morph_engine_restarts_total")) - calm_restarts
    report.shifts = int(server.metric("morph_shifts_total")) if "morph_shifts_total" in server.metrics_text() else 0
    if report.restarts > report.ended_engines:
        report.complaints.append(f"{report.restarts} restarts, but we have ended {report.ended_engines} engines")
    if server.metric("morph_backend_errors_total"):
        report.complaints.append("defects in the serving process, see its log")


def compare(before: check.Footprint, after: check.Footprint, clock: bool) -> list[str]:
    """What has grown.

    With a false clock, connections that their clients have reset do not count: gRPC gives them back when its timers
    run; these wait for the wall clock by system calls of their own, whose deadlines libfaketime does not translate.
    """
    found = []
    for what in ("threads", "descriptors"):
        for name, count in getattr(before, what).items():
            now = getattr(after, what).get(name, 0)
            gone = after.open_kinds[name][GONE] if clock and what == "descriptors" and name == "server" else 0
            if now - gone > count + 2:
                found.append(f"{what} of {name}: {now}, before {count}; more of: {after.more(what, before, name)}")
    if after.shared > before.shared:
        found.append(f"shared memory: {after.shared} regions, before {before.shared}")
    return found


class Clients:
    """Threads that send one request after the other while it is their turn."""

    def __init__(self, server: TritonServer, weather: Weather, seen: list[streams.Seen]) -> None:
        self._server, self._weather, self._seen = server, weather, seen
        self._trace = weather.levels == "free"
        self._asks = plan.asks(weather.seed, weather.max_tokens)
        self._lock = threading.Lock()
        self._turn = threading.Condition()
        self._busy = 0
        self._over = False

    def run(self) -> None:
        """From the first burst to the end of the last stream."""
        threads = [threading.Thread(target=self._live, args=(number,), daemon=True) for number in range(MOST_CLIENTS)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        phases = plan.bursts(self._weather.seed, self._weather.seconds, MOST_CLIENTS)
        for (_, busy), until_s in zip(phases, [*(at for at, _ in phases[1:]), self._weather.seconds], strict=True):
            with self._turn:
                self._busy = busy
                self._turn.notify_all()
            time.sleep(max(0.0, began + until_s - time.monotonic()))
        with self._turn:
            self._over = True
            self._turn.notify_all()
        for thread in threads:
            thread.join(180)

    def _live(self, number: int) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._over or number < self._busy)
                if self._over:
                    return
            with self._lock:
                ask = next(self._asks)
            seen = streams.run(self._server, ask, 240.0 if ask.way == "generate" else 60.0, self._trace)
            with self._lock:
                self._seen.append(seen)


def any_seed() -> int:
    """A seed for a run that names none."""
    return random.SystemRandom().randrange(10**6)
