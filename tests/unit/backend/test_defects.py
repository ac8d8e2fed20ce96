"""An exception that nobody foresaw costs a request, or a round of a duty: never a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from backend.test_service import House, finished, until
from morph_backend.housekeeper import Housekeeper
from morph_backend.nudge import QueueNudger
from morph_backend.worker import Worker


@pytest.fixture
def house(make_sender: Any, make_request: Any) -> Iterator[House]:
    house = House(make_sender, make_request)
    yield house
    house.service.close()


class Fragile(Worker):
    def __init__(self, on_defect: Any) -> None:
        super().__init__("fragile", 0.001, on_defect)
        self.lives = 0
        self.third = threading.Event()

    def _run(self) -> None:
        self.lives += 1
        if self.lives < 3:
            raise ZeroDivisionError("oops")
        self.third.set()
        self._stop.wait()


def test_a_worker_whose_life_raises_begins_anew_and_can_still_be_closed() -> None:
    defects: list[str] = []
    worker = Fragile(defects.append)
    worker.start()
    assert worker.third.wait(60)
    worker.close()
    assert not worker._thread.is_alive() and defects == ["fragile", "fragile"]


def test_a_duty_that_raises_is_counted_and_the_others_are_done() -> None:
    defects: list[str] = []
    done = threading.Event()

    def broken() -> None:
        raise ZeroDivisionError("oops")

    housekeeper = Housekeeper(0.001, [broken, done.set], defects.append)
    housekeeper.start()
    assert done.wait(60)
    housekeeper.close()
    assert set(defects) == {"housekeeper"}


def test_a_nudger_whose_backlog_probe_raises_lives_on() -> None:
    defects: list[str] = []

    def broken() -> int:
        raise ValueError("no number")

    nudger = QueueNudger(lambda _listener: None, broken, on_defect=defects.append, pause_s=0.001, retry_s=0.001)  # type: ignore[arg-type, return-value]
    for count in (1, 2):
        nudger.entered()
        nudger.left()
        until(lambda count=count: len(defects) == count)
    nudger.close()
    assert not nudger._thread.is_alive()


def test_tokens_that_cannot_be_handled_end_their_request_and_no_other(house: House, monkeypatch: Any) -> None:
    real = house.service._accounting.arrived

    def arrived(request: Any, *rest: Any) -> Any:
        if request.given.text == "bad":
            raise ZeroDivisionError("oops")
        return real(request, *rest)

    monkeypatch.setattr(house.service._accounting, "arrived", arrived)
    bad = finished(house.ask('{"max_tokens": 50}', text="bad"))
    assert bad.error.code == "INTERNAL" and "oops" in str(bad.error)
    good = finished(house.ask('{"max_tokens": 50}'))
    assert good.error is None and good.text.startswith("hello world")
    assert house.counts("morph_backend_errors_total") == {(("thread", "engine-reader"),): 1}


def test_a_snapshot_that_cannot_be_handled_is_counted(house: House, monkeypatch: Any) -> None:
    def broken(_stats: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(house.service._engine_metrics, "stats", broken)
    until(lambda: house.counts("morph_backend_errors_total"))
    assert finished(house.ask('{"max_tokens": 5}')).error is None


def test_a_request_that_cannot_be_polled_does_not_hide_the_others(house: House) -> None:
    house.engine.held.set()
    sick, gone = house.ask('{"max_tokens": 400}', stream=True), house.ask('{"max_tokens": 400}', stream=True)
    until(lambda: sick.responses and gone.responses)

    def broken() -> bool:
        raise RuntimeError("no answer")

    sick.is_cancelled = broken
    gone.cancelled = True
    house.service.poll()
    assert finished(gone).error.code == "CANCELLED"
    assert finished(sick).error.code == "INTERNAL"


def test_while_the_engine_is_restarted_the_serving_process_beats_for_it(house: House) -> None:
    house.service.on_restarting("it fell over")
    assert not house.service.healthy
    house.recorder.take()
    house.service.poll()
    beats = [name for name, _ in house.recorder.take().gauges]
    assert "morph_engine_heartbeat_seconds" in beats
    house.service.on_restarted()
    assert house.service.healthy
