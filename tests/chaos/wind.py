"""What is done to the server in a storm, while the clients go on."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from operator import attrgetter
from typing import TYPE_CHECKING

import false_clock
from tests.chaos import check, plan
from triton_server import TritonServer
from wire_client import until

if TYPE_CHECKING:
    from tests.chaos.storm import Report

LATE_S = 0.5
"""A fault that comes so much after its time has had to wait, for an engine or for the fault before."""
LONGEST_ABSENCE_S = 180.0
"""Within which an engine has to be up again: some starts that were struck, and the pauses between them."""
DEADLY = {"kill engine": signal.SIGKILL, "segfault engine": signal.SIGSEGV, "terminate engine": signal.SIGTERM}


def blow(
    server: TritonServer,
    clock: false_clock.FalseClock | None,
    report: Report,
    ends_s: list[float],
    over: threading.Event,
) -> None:
    """Disturb, and tell if that comes to nothing: a storm that has fallen asleep is no storm."""
    try:
        _disturb(server, clock, report, ends_s, over)
    except (AssertionError, OSError, KeyError) as error:
        report.complaints.append(f"no faults after {len(report.done)}: {type(error).__name__}: {error}")


def _disturb(
    server: TritonServer,
    clock: false_clock.FalseClock | None,
    report: Report,
    ends_s: list[float],
    over: threading.Event,
) -> None:
    weather = report.weather
    if not weather.every_s:
        return
    began = time.monotonic()
    faults = plan.faults(weather.seed, weather.seconds, weather.every_s, weather.faults, weather.silence_s)
    if clock is not None:
        faults = sorted([*faults, *plan.jumps(weather.seed, weather.seconds, weather.every_s)], key=attrgetter("at_s"))
    for fault in faults:
        if over.wait(max(0.0, began + fault.at_s - time.monotonic())) or time.monotonic() > began + weather.seconds:
            return
        if clock is not None and fault.what == "set clock":
            report.done.append(fault.what)
            clock.set(int(fault.for_s))
            continue
        # Where a start takes longer than faults are apart, each engine would be struck as soon as it is up, and nothing
        # could ever get on: an engine that had to be waited for is left alone for a while. After a fault that is late
        # the metric may still speak of the engine before.
        late = time.monotonic() - (began + fault.at_s) > LATE_S
        if (late or server.metric("morph_engine_up") != 1) and not _rest(server, weather.every_s / 2, over):
            return
        pid, now = _find(server, _victim(fault, report)), time.monotonic()
        if over.is_set():
            return
        try:
            os.kill(pid, DEADLY.get(fault.what, signal.SIGSTOP))
        except ProcessLookupError:
            continue  # it has ended since we looked
        report.done.append(fault.what)
        if fault.what in DEADLY:
            ends_s.append(now)
            report.note_end(now, own_fault=fault.what == "segfault engine")
            continue
        if fault.what == "wedge engine":
            _await_wedge(server, pid, report)
        else:
            over.wait(fault.for_s)
            _let_go(pid, fault, report)


def _victim(fault: plan.Fault, report: Report) -> str:
    """The process that a fault strikes; of several serving processes each in its turn."""
    if fault.what != "stop stub":
        return "engine"
    turn = report.done.count(fault.what) % report.weather.instances
    return f"stub {turn + 1}" if turn else "stub"


def _rest(server: TritonServer, for_s: float, over: threading.Event) -> bool:
    """Wait for an engine that is still up after so long; False if the storm is over before."""
    while True:
        engine = _find(server, "engine")
        if over.wait(for_s):
            return False
        if server.metric("morph_engine_up") == 1 and _find(server, "engine") == engine:
            return True


def _find(server: TritonServer, name: str) -> int:
    """The id of a process of an engine that is up; the metric is a little behind what is so."""
    found: dict[str, int] = {}

    def look() -> bool:
        found.update(check.processes(server) if server.metric("morph_engine_up") == 1 else {})
        return name in found

    until(look, LONGEST_ABSENCE_S, f"the {name}")
    return found[name]


def _let_go(pid: int, fault: plan.Fault, report: Report) -> None:
    """Let a stopped process go on. An engine that is gone was late before: all that together was too long."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        if fault.what != "stop engine":
            raise
        report.note_end(time.monotonic(), own_fault=True)


def _await_wedge(server: TritonServer, pid: int, report: Report) -> None:
    """A stopped engine is killed once it has requests and says nothing; without requests it is let go."""
    handle = os.pidfd_open(pid)
    try:
        deadline = time.monotonic() + report.weather.silence_s + 3.0
        while time.monotonic() < deadline:
            if _has_ended(handle):
                report.note_end(time.monotonic(), own_fault=True)
                return
            time.sleep(0.1)
        signal.pidfd_send_signal(handle, signal.SIGCONT)
        time.sleep(0.3)
        if _has_ended(handle):
            report.note_end(time.monotonic(), own_fault=True)
    finally:
        os.close(handle)


def _has_ended(handle: int) -> bool:
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    return bool(poller.poll(0))
