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


def test_the_oldest_send_under_way_counts_until_it_returns() -> None:
    clock = Clock()
    times = SendTimes(clock)
    assert times.longest_s() == 0
    times.begin()
    clock.now += 3
    begun, go_on = threading.Event(), threading.Event()

    def other() -> None:
        times.begin()
        begun.set()
        assert go_on.wait(60)
        times.end()

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(60)
    clock.now += 2
    assert times.longest_s() == 5
    times.end()
    assert times.longest_s() == 2
    go_on.set()
    thread.join()
    assert times.longest_s() == 0


@pytest.mark.parametrize("way", ["send", "final", "fail"])
def test_a_send_that_raises_is_over(way: str) -> None:
    seen: list[float] = []
    clock = Clock()
    times = SendTimes(clock)

    class Sender:
        def send(self, *_arguments: Any, **_named: Any) -> None:
            clock.now += 1
            seen.append(times.longest_s())
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
    assert times.longest_s() == 0


def test_who_is_stuck_is_told_once_and_a_short_send_never() -> None:
    clock, told = Clock(), list[str]()
    times = SendTimes(clock)
    heard = threading.Event()

    def stuck(reason: str) -> None:
        told.append(reason)
        heard.set()

    watch = SendWatch(times, 60.0, stuck, interval_s=0.001)
    watch.start()
    times.begin()
    clock.now += 60
    assert not heard.wait(0.05)
    clock.now += 1
    assert heard.wait(60)
    watch._thread.join(60)
    watch.close()
    assert told == ["Triton has not taken a response for 60 s; its front end hangs."]
