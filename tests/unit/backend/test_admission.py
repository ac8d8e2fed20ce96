"""Credits are given by the rule of `morph_runtime.credits`, taken back once, and waited for."""

from __future__ import annotations

import threading
import time

from backend.test_service import until
from morph_backend.admission import Admission, Admitted
from morph_runtime.credits import CreditLimits, EngineNews

PROMPT = 10
"""Tokens."""


def never() -> bool:
    return False


def test_the_line_is_the_limit() -> None:
    admission = Admission(CreditLimits(2))
    for key in (1, 2):
        assert admission.acquire([key], PROMPT, never) is Admitted.YES
    result: list[Admitted] = []
    thread = threading.Thread(target=lambda: result.append(admission.acquire([3], PROMPT, never, poll_s=600)))
    thread.start()
    until(lambda: admission.waiting == 1)
    admission.release([99])
    admission.release([1])
    admission.release([1])
    thread.join(60)
    assert result == [Admitted.YES] and admission.waiting == 0


def test_giving_up_is_noticed_at_once_after_a_wake() -> None:
    admission = Admission(CreditLimits(1))
    admission.acquire([1], PROMPT, never)
    gone = threading.Event()
    result: list[Admitted] = []
    thread = threading.Thread(target=lambda: result.append(admission.acquire([2], PROMPT, gone.is_set, poll_s=600)))
    thread.start()
    until(lambda: admission.waiting == 1)
    gone.set()
    admission.wake()
    thread.join(60)
    assert result == [Admitted.GAVE_UP]


def test_giving_up_is_noticed_without_a_wake() -> None:
    admission = Admission(CreditLimits(1))
    admission.acquire([1], PROMPT, never)
    over_s = time.monotonic() + 0.05
    assert admission.acquire([2], PROMPT, lambda: time.monotonic() > over_s, poll_s=0.01) is Admitted.GAVE_UP


def test_closing_ends_every_wait() -> None:
    admission = Admission(CreditLimits(1))
    admission.acquire([1], PROMPT, never)
    result: list[Admitted] = []
    threads = [
        threading.Thread(target=lambda k=k: result.append(admission.acquire([k], PROMPT, never, poll_s=600)))
        for k in range(2, 5)
    ]
    for thread in threads:
        thread.start()
    until(lambda: admission.waiting == 3)
    admission.close()
    for thread in threads:
        thread.join(60)
    assert result == [Admitted.CLOSED] * 3
    admission.release([1])
    assert admission.acquire([9], PROMPT, never) is Admitted.CLOSED


def waits(admission: Admission, keys: list[int]) -> tuple[threading.Thread, list[Admitted]]:
    """A thread that waits for credits, and where its result will be."""
    result: list[Admitted] = []
    thread = threading.Thread(
        target=lambda: result.append(admission.acquire(keys, PROMPT, never, poll_s=600)), daemon=True
    )
    thread.start()
    until(lambda: admission.waiting == 1)
    return thread, result


def test_short_prompts_are_admitted_until_they_fill_a_step() -> None:
    admission = Admission(CreditLimits(2, step_tokens=100, seats=50))
    for key in range(10):
        assert admission.acquire([key], PROMPT, never) is Admitted.YES
    thread, result = waits(admission, [10])
    admission.stepped([3], EngineNews(running=1))
    thread.join(60)
    assert result == [Admitted.YES]


def test_no_more_are_admitted_than_there_are_seats() -> None:
    admission = Admission(CreditLimits(2, step_tokens=100, seats=4))
    admission.stepped([], EngineNews(running=1))
    for key in range(3):
        assert admission.acquire([key], PROMPT, never) is Admitted.YES
    thread, result = waits(admission, [3])
    admission.stepped([0], EngineNews(running=2))  # who has begun has taken the seat with him
    thread.join(0.1)
    assert not result
    admission.stepped([], EngineNews(running=1))
    thread.join(60)
    assert result == [Admitted.YES]


def test_while_blocks_are_short_the_line_alone_counts() -> None:
    admission = Admission(CreditLimits(2, step_tokens=100, seats=50))
    admission.stepped([], EngineNews(running=5, short_of_blocks=True))
    for key in range(2):
        assert admission.acquire([key], PROMPT, never) is Admitted.YES
    thread, result = waits(admission, [2])
    admission.stepped([], EngineNews(running=5, short_of_blocks=True))
    thread.join(0.1)
    assert not result
    admission.stepped([], EngineNews(running=5))
    thread.join(60)
    assert result == [Admitted.YES]


def test_the_limits_of_an_engine_that_has_come_up_hold_at_once() -> None:
    admission = Admission(CreditLimits(1))
    admission.acquire([0], PROMPT, never)
    thread, result = waits(admission, [1])
    admission.set_limits(CreditLimits(1, step_tokens=100, seats=50))
    thread.join(60)
    assert result == [Admitted.YES]


def test_who_asked_first_enters_first_however_much_he_asks_for() -> None:
    """With several serving processes several wait: small requests must not take every credit that comes free."""
    admission = Admission(CreditLimits(2))
    admission.acquire([1, 2], PROMPT, never)
    wide, entered = waits(admission, [10, 11, 12, 13])
    small = threading.Thread(target=lambda: admission.acquire([20], PROMPT, never, poll_s=0.001), daemon=True)
    small.start()
    until(lambda: admission.waiting == 2)
    admission.stepped([1], EngineNews(running=1))
    small.join(0.1)
    assert admission.waiting == 2 and not entered
    admission.stepped([2], EngineNews(running=2))
    wide.join(60)
    assert entered == [Admitted.YES] and small.is_alive()
    admission.stepped([10, 11, 12, 13], EngineNews(running=6))
    small.join(60)
    assert not small.is_alive()


def test_who_gives_up_waiting_makes_way() -> None:
    admission = Admission(CreditLimits(1))
    admission.acquire([1], PROMPT, never)
    left = threading.Event()
    first = threading.Thread(target=lambda: admission.acquire([2], PROMPT, left.is_set, poll_s=600), daemon=True)
    first.start()
    until(lambda: admission.waiting == 1)
    second: list[Admitted] = []
    later = threading.Thread(
        target=lambda: second.append(admission.acquire([3], PROMPT, never, poll_s=600)), daemon=True
    )
    later.start()
    until(lambda: admission.waiting == 2)
    left.set()
    admission.wake()
    first.join(60)
    admission.release([1])
    later.join(60)
    assert second == [Admitted.YES]
