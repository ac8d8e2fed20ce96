"""The storm's own conduct: when it strikes, and that it says so when it no longer can."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos import check, plan, storm, wind
from tests.chaos.plan import Fault


class Restarting:
    """A server whose engine is up from a moment on."""

    def __init__(self, up_s: float) -> None:
        self.up_s = up_s

    def metric(self, name: str) -> float:
        assert name == "morph_engine_up"
        return float(time.monotonic() >= self.up_s)


class Blinking(Restarting):
    """One whose metric says for a moment that its engine is up, and then that it is not."""

    def __init__(self, now_s: float) -> None:
        super().__init__(now_s + 0.6)
        self._stale = 1

    def metric(self, name: str) -> float:
        self._stale, stale = 0, self._stale
        return stale or super().metric(name)


class StoppedThenGone:
    """`os.kill` of a process that ends while it is stopped."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def __call__(self, pid: int, number: int) -> None:
        self.signals.append(number)
        if number == signal.SIGCONT:
            raise ProcessLookupError


def blow(server: Any, **weather: Any) -> tuple[storm.Report, list[float]]:
    report, struck_s = storm.Report(storm.Weather(1, 60.0, **weather)), list[float]()
    wind.blow(server, None, report, struck_s, threading.Event())
    return report, struck_s


def test_an_engine_that_is_late_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "faults", lambda *_: [Fault(0.0, "kill engine")])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as engine:
        monkeypatch.setattr(check, "processes", lambda _: {"engine": engine.pid})
        server = Restarting(time.monotonic() + 0.3)
        report, (struck_s,) = blow(server, every_s=0.8)
        assert engine.wait(60) == -9
    assert struck_s >= server.up_s + 0.4
    assert report.done == ["kill engine"] and not report.complaints


def test_a_fault_that_is_late_does_not_strike_an_engine_that_the_metric_does_not_know_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine before has just been struck: the metric still says that it is up, and its successor is starting."""
    monkeypatch.setattr(plan, "faults", lambda *_: [Fault(-1.0, "kill engine")])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as engine:
        monkeypatch.setattr(check, "processes", lambda _: {"engine": engine.pid})
        server = Blinking(time.monotonic())
        _, (struck_s,) = blow(server, every_s=0.8)
        assert engine.wait(60) == -9
    assert struck_s >= server.up_s + 0.4


def test_a_stopped_engine_that_is_ended_meanwhile_does_not_end_the_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "faults", lambda *_: [Fault(0.0, "stop engine", 0.1)])
    monkeypatch.setattr(check, "processes", lambda _: {"engine": 2**22 + 1})  # no process has this id
    monkeypatch.setattr(wind.os, "kill", stopped_then_gone := StoppedThenGone())
    report, _ = blow(Restarting(0.0), every_s=0.1)
    assert stopped_then_gone.signals == [signal.SIGSTOP, signal.SIGCONT]
    assert not report.complaints and report.ended_engines == len(report.own_faults_s) == 1


def test_a_storm_that_can_no_longer_strike_is_no_good_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: str) -> float:
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(plan, "faults", lambda *_: [Fault(0.0, "kill engine")])
    report, _ = blow(SimpleNamespace(metric=refused), every_s=1.0)
    assert report.complaints == ["no faults after 0: ConnectionRefusedError: nobody listens"] and not report.good
