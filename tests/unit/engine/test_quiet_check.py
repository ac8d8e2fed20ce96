"""The books are checked in a quiet engine alone: no client waits for that, and a lasting quiet needs it once."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest

from engine.test_process import GREEDY, config_for
from morph_runtime.config import EngineConfig
from morph_runtime.engine import build
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import QueueSignal, Submit, ToEngine
from morph_runtime.engine.process import CHECK_EVERY_S, QUIET_S, Inbox, serve
from morph_runtime.engine.wire import FrameWriter
from morph_runtime.errors import IntegrityError


class Script(Inbox):
    """Brings messages at given times of a clock that stands still but for waits: work takes no time."""

    def __init__(self, messages: list[tuple[float, ToEngine]], end_s: float) -> None:
        self.closed = threading.Event()
        self.now_s = 0.0
        self._messages_at, self._end_s = messages, end_s

    def clock(self) -> float:
        return self.now_s

    def wake(self) -> None:
        return None

    def wait(self, timeout_s: float) -> bool:
        next_s = self._messages_at[0][0] if self._messages_at else self._end_s
        woken = next_s <= self.now_s + timeout_s
        self.now_s = next_s if woken else self.now_s + timeout_s
        if woken and not self._messages_at:
            self.closed.set()
        return woken

    def take(self) -> list[ToEngine]:
        taken = [message for at_s, message in self._messages_at if at_s <= self.now_s]
        del self._messages_at[: len(taken)]
        return taken


class Silence:
    def send(self, message: object) -> None:
        return None


def request(key: int) -> Submit:
    return Submit(key=key, prompt=[1, 2, 3], sampling=GREEDY)


def checks(
    folder: Path, messages: list[tuple[float, ToEngine]], end_s: float, patch: pytest.MonkeyPatch
) -> list[float]:
    """When the engine process has checked its books, on the clock of these messages."""
    script, times = Script(sorted(messages, key=lambda one: one[0]), end_s), []
    made = build.build_engine

    def watched(config: EngineConfig, **others: object) -> Engine:
        engine = made(config, **others)  # type: ignore[arg-type]
        check = engine.check_integrity

        def note() -> None:
            times.append(script.now_s)
            check()

        engine.check_integrity = note  # type: ignore[method-assign]
        return engine

    patch.setattr(build, "build_engine", watched)
    serve(script, cast(FrameWriter, Silence()), config_for(folder), script.clock)
    return times


def test_no_check_comes_between_request_and_request_and_one_when_they_are_over(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_s = 3 * QUIET_S
    came: list[tuple[float, ToEngine]] = [(0.01 + last_s * k / 30, request(k + 1)) for k in range(30)]
    signals: list[tuple[float, ToEngine]] = [(0.2 * k, QueueSignal(taken_s=0.2 * k, pending=0)) for k in range(2000)]
    times = checks(tiny_model, came + signals, 400.0, monkeypatch)
    assert len(times) == 1, "what nothing has changed since is not checked again"
    assert last_s < times[0] < last_s + 2 * QUIET_S, "the outer queue's news are no work"


def test_no_request_finds_a_check_under_way_when_it_comes_as_it_is_about_to_begin(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[tuple[float, ToEngine]] = [(1.1 * QUIET_S * k, request(k + 1)) for k in range(1, 20)]
    times = checks(tiny_model, list(came), 60.0, monkeypatch)
    assert times and not set(times) & {at_s for at_s, _ in came}


def test_however_often_it_is_quiet_a_check_comes_once_a_minute(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = checks(tiny_model, [(3.0 * k, request(k + 1)) for k in range(50)], 300.0, monkeypatch)
    assert 2 <= len(times) <= 4
    assert all(b - a >= CHECK_EVERY_S for a, b in pairwise(times))


def test_damaged_books_end_a_quiet_engine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(engine: Engine) -> None:
        raise IntegrityError("The books do not agree.")

    monkeypatch.setattr(Engine, "check_integrity", damaged)
    with pytest.raises(IntegrityError):
        checks(tiny_model, [(0.0, request(1))], 10.0, monkeypatch)
