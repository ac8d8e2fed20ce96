"""The nudger wakes Triton's batcher when a request may be stuck, and stays out of the way otherwise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from morph_backend.nudge import QueueNudger


class FakeQueue:
    """Stands for Triton: counts nudges, answers them if told to, and can be waited for."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.opened = self.closed = self.sent = 0
        self.answers = True
        self.broken = self.failing = False
        self.backlog = 1
        self.looks = 0
        self.reported = 0
        self._listener: Callable[[], None] = lambda: None

    def connect(self, listener: Callable[[], None]) -> FakeQueue:
        if self.broken:
            raise OSError("refused")
        self._listener = listener
        with self.condition:
            self.opened += 1
        return self

    def look(self) -> int:
        with self.condition:
            self.looks += 1
            self.condition.notify_all()
        return self.backlog

    def answer(self) -> None:
        self._listener()

    def report(self) -> None:
        with self.condition:
            self.reported += 1
            self.condition.notify_all()

    def send(self) -> None:
        if self.failing:
            raise OSError("the stream has broken")
        with self.condition:
            self.sent += 1
            if self.answers:
                self.backlog = max(0, self.backlog - 1)  # the nudge has moved one on
            self.condition.notify_all()
        if self.answers:
            self._listener()

    def close(self) -> None:
        with self.condition:
            self.closed += 1
            self.condition.notify_all()

    def wait(self, what: Callable[[], bool]) -> None:
        with self.condition:
            assert self.condition.wait_for(what, 60)


@pytest.fixture
def queue() -> FakeQueue:
    return FakeQueue()


@pytest.fixture
def nudgers() -> Iterator[Callable[..., QueueNudger]]:
    made: list[QueueNudger] = []

    def make(queue: FakeQueue, **times: float) -> QueueNudger:
        made.append(
            QueueNudger(
                queue.connect,
                queue.look,
                on_sent=queue.report,
                **{"pause_s": 0.005, "answer_s": 0.02, "idle_s": 60.0, "most_s": 60.0, **times},
            )
        )
        return made[-1]

    yield make
    for nudger in made:
        nudger.close()


def test_it_nudges_once_after_execute_has_returned_and_the_queue_answers(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    nudger = nudgers(queue)
    for count in (1, 2, 3):
        queue.backlog = 1
        nudger.entered()
        nudger.left()
        queue.wait(lambda expected=count: queue.sent == queue.reported == expected)
    assert queue.opened == 1


def test_requests_that_were_seen_in_the_queue_are_nudged_for_without_another_look(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    queue.backlog, queue.answers = 10, False
    nudger = nudgers(queue, answer_s=60.0)
    nudger.entered()
    nudger.left()
    for count in range(1, 11):
        queue.wait(lambda expected=count: queue.sent == expected)
        assert queue.looks == 1
        queue.backlog = 0
        nudger.entered()  # the nudge's effect
        queue.answer()
        nudger.left()
    queue.wait(lambda: queue.looks == 2)


def test_the_nudge_for_a_known_request_is_sent_as_execute_returns(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    queue.backlog, queue.answers = 10, False
    nudger = nudgers(queue, answer_s=60.0)
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.sent == 1)  # the thread has looked, and opened the stream
    for count in range(2, 11):
        nudger.entered()
        queue.answer()
        nudger.left()
        assert queue.sent == count


def test_a_stream_that_breaks_as_execute_returns_harms_nobody(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    queue.backlog, queue.answers = 10, False
    nudger = nudgers(queue, answer_s=0.001, retry_s=0.001)
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.sent >= 1)
    nudger.entered()
    queue.failing = True
    nudger.left()
    queue.wait(lambda: queue.closed == 1)
    queue.failing = False
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.opened == 2)


def test_who_was_seen_in_the_queue_and_has_been_cancelled_costs_one_nudge(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    queue.backlog = 10
    nudger = nudgers(queue)
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.sent == 1)
    nudger.entered()
    queue.backlog = 0
    nudger.left()
    queue.wait(lambda: queue.looks >= 2)
    nudger.close()
    assert queue.sent <= 2


def test_it_looks_again_and_nudges_again_if_nobody_comes_though_the_nudge_was_answered(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    queue.backlog = 3
    nudger = nudgers(queue)
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.looks == 4 and queue.sent == 3)


def test_the_answer_to_an_earlier_nudge_does_not_pass_for_that_to_the_next(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    queue.answers = False
    nudger = nudgers(queue)
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.sent == 2)
    queue.answer()
    queue.wait(lambda: queue.sent >= 3)


def test_it_does_not_nudge_when_nothing_is_queued(queue: FakeQueue, nudgers: Callable[..., QueueNudger]) -> None:
    queue.backlog = 0
    nudger = nudgers(queue)
    for _ in range(20):
        nudger.entered()
        nudger.left()
    nudger.close()
    assert queue.sent == queue.opened == 0


def test_it_does_not_nudge_when_the_next_request_comes_by_itself(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    nudger = nudgers(queue, pause_s=600.0)
    for _ in range(100):
        nudger.entered()
        nudger.left()
    nudger.entered()
    nudger.close()
    assert queue.sent == 0


def test_it_does_not_nudge_while_the_next_request_is_held_in_execute(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    queue.answers = False
    nudger = nudgers(queue, pause_s=0.001)
    for pause_s in [0.0] * 100 + [0.002] * 50:
        nudger.entered()
        nudger.left()
        threading.Event().wait(pause_s)  # so that some come before the nudge, some after it, some at once
        nudger.entered()
        sent = queue.sent
        threading.Event().wait(0.002)
        assert queue.sent <= sent + 1, "one may have been on its way"
        nudger.left()
    nudger.entered()
    nudger.close()


def test_it_nudges_again_while_nothing_happens(queue: FakeQueue, nudgers: Callable[..., QueueNudger]) -> None:
    queue.answers = False
    nudger = nudgers(queue)
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.sent >= 4)
    nudger.entered()
    sent = queue.sent
    nudger.close()
    assert queue.sent <= sent + 1


def test_an_idle_stream_is_closed_so_that_the_model_can_unload(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    nudger = nudgers(queue, idle_s=0.05)
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.closed == 1)
    queue.backlog = 1
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.sent == 2)
    assert queue.opened == 2


def with_an_open_nudge(queue: FakeQueue, nudgers: Callable[..., QueueNudger]) -> QueueNudger:
    """A nudger that has sent one, to which there is no answer yet; its stream is soon idle."""
    queue.answers = False
    nudger = nudgers(queue, idle_s=0.01, answer_s=60.0)
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.sent == 1)
    queue.backlog = 0
    return nudger


def test_a_stream_with_a_nudge_in_the_queue_is_not_idle(queue: FakeQueue, nudgers: Callable[..., QueueNudger]) -> None:
    nudger = with_an_open_nudge(queue, nudgers)
    nudger.entered()
    nudger.left()  # nothing is queued but the nudge, which Triton has not answered yet
    queue.wait(lambda: queue.looks == 2)
    threading.Event().wait(0.2)
    assert queue.closed == 0
    queue.answer()
    queue.wait(lambda: queue.closed == 1)


def test_a_stream_is_not_idle_while_a_request_is_held_in_execute(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger]
) -> None:
    nudger = with_an_open_nudge(queue, nudgers)
    nudger.entered()
    queue.answer()
    threading.Event().wait(0.2)
    assert queue.closed == 0
    nudger.left()
    queue.wait(lambda: queue.closed == 1)


def test_a_server_out_of_reach_is_said_once_and_tried_again(
    queue: FakeQueue, nudgers: Callable[..., QueueNudger], caplog: pytest.LogCaptureFixture
) -> None:
    queue.broken = True
    nudger = nudgers(queue, retry_s=0.01)
    for _ in range(3):
        nudger.entered()
        nudger.left()
    queue.broken = False
    nudger.entered()
    nudger.left()
    queue.wait(lambda: queue.sent >= 1)
    assert sum("cannot be nudged" in r.message for r in caplog.records) <= 1


def test_a_server_that_does_not_answer_cannot_hold_up_the_end(
    queue: FakeQueue, monkeypatch: pytest.MonkeyPatch, nudgers: Callable[..., QueueNudger]
) -> None:
    go_on, began = threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        go_on.wait(60)

    monkeypatch.setattr(queue, "send", hang)
    nudger = nudgers(queue)
    nudger.entered()
    nudger.left()
    assert began.wait(60)
    nudger.close(timeout_s=0.05)
    assert not go_on.is_set()
    go_on.set()
