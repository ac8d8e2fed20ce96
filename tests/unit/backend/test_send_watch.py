"""A send that never returns is noticed, and nothing else is taken for one."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from morph_backend.channel import ResponseChannel, Status
from morph_backend.send_watch import SendTimes, SendWatch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def watched(times: SendTimes) -> SendWatch:
    """One that looks when the test does: once a second, it believes."""
    return SendWatch(times, 60.0, lambda _reason: None)


def test_the_oldest_send_under_way_counts_until_it_returns() -> None:
    clock = Clock()
    times = SendTimes(clock)
    watch = watched(times)
    assert watch.longest_s() == 0
    times.begin()
    for expected in (1, 2, 3):
        clock.now += 1
        assert watch.longest_s() == expected
    begun, go_on = threading.Event(), threading.Event()

    def other() -> None:
        times.begin()
        begun.set()
        assert go_on.wait(60)
        times.end()

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(60)
    for expected in (4, 5):
        clock.now += 1
        assert watch.longest_s() == expected
    times.end()
    assert watch.longest_s() == 2
    go_on.set()
    thread.join()
    assert watch.longest_s() == 0


def test_the_next_send_of_a_thread_begins_at_nothing() -> None:
    clock = Clock()
    times = SendTimes(clock)
    watch = watched(times)
    for _ in range(100):
        times.begin()
        clock.now += 0.75
        assert watch.longest_s() == 0.75
        times.end()


def test_a_pause_of_this_process_is_not_taken_for_a_send_that_hangs() -> None:
    clock = Clock()
    times = SendTimes(clock)
    watch = watched(times)
    times.begin()
    clock.now += 1
    assert watch.longest_s() == 1
    clock.now += 600  # SIGSTOP and SIGCONT, with the send under way
    assert watch.longest_s() == 3
    for _ in range(57):
        clock.now += 1
        longest_s = watch.longest_s()
    assert longest_s == 60, "one that hangs is noticed all the same"


@pytest.mark.parametrize("way", ["send", "final", "fail"])
def test_a_send_that_raises_is_over(way: str) -> None:
    seen: list[float] = []
    clock = Clock()
    times = SendTimes(clock)
    watch = watched(times)

    class Sender:
        def send(self, *_arguments: Any, **_named: Any) -> None:
            clock.now += 1
            seen.append(watch.longest_s())
            raise RuntimeError("no")

    channel = ResponseChannel(Sender(), times)
    if way == "send":
        with pytest.raises(RuntimeError):
            channel.send([], final=False)
    elif way == "final":
        channel.send([], final=True)
    else:
        channel.fail(Status.INTERNAL, "because")
    assert seen and set(seen) == {1.0}
    assert watch.longest_s() == 0


def test_who_is_stuck_is_told_once() -> None:
    told: list[str] = []
    heard = threading.Event()

    def stuck(reason: str) -> None:
        told.append(reason)
        heard.set()

    times = SendTimes()
    watch = SendWatch(times, 0.02, stuck, interval_s=0.001)
    watch.start()
    times.begin()
    assert heard.wait(60)
    watch._thread.join(60)
    watch.close()
    assert told == ["Triton has not taken a response for 0.02 s; its front end hangs."]
