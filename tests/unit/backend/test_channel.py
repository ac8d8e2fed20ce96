from __future__ import annotations

import threading
from typing import Any

import pytest

from morph_backend.channel import ResponseChannel, Status


def test_one_final_and_nothing_after_it(sender: Any) -> None:
    channel = ResponseChannel(sender)
    assert channel.send([], final=False) and channel.send([], final=True)
    assert channel.closed
    assert not channel.send([], final=False) and not channel.send([], final=True)
    assert not channel.fail(Status.INTERNAL, "late")
    sender.cancelled = True
    assert channel.is_cancelled() is False
    assert (sender.finals, sender.misuse) == (1, [])


def test_an_error_is_final_and_has_its_status(sender: Any) -> None:
    channel = ResponseChannel(sender)
    assert channel.fail(Status.UNAVAILABLE, "gone")
    assert (str(sender.error), sender.error.code, sender.finals) == ("gone", "UNAVAILABLE", 1)


def test_a_failed_send_leaves_the_channel_open(sender: Any) -> None:
    channel = ResponseChannel(sender)
    sender.broken = True
    with pytest.raises(RuntimeError):
        channel.send([], final=False)
    assert not channel.closed and channel.fail(Status.INTERNAL, "no")
    assert sender.finals == 1


def test_a_final_that_cannot_be_sent_still_closes_the_request(sender: Any) -> None:
    sender.broken_final = True
    assert ResponseChannel(sender).send([], final=True)
    assert sender.finals == 1


def test_a_poll_does_not_wait_for_a_send(sender: Any) -> None:
    channel = ResponseChannel(sender)
    sender.cancelled = True
    inside, leave = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        inside.set()
        leave.wait(60)

    sender.send = slow
    thread = threading.Thread(target=channel.send, args=([],), kwargs={"final": False})
    thread.start()
    assert inside.wait(60)
    assert channel.is_cancelled() is False
    leave.set()
    thread.join()
    assert channel.is_cancelled() is True


def test_polls_and_finals_from_many_threads(make_sender: Any) -> None:
    for _ in range(50):
        sender = make_sender()
        channel = ResponseChannel(sender)
        threads = [threading.Thread(target=channel.is_cancelled) for _ in range(4)]
        threads += [threading.Thread(target=channel.fail, args=(Status.INTERNAL, "x")) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (sender.finals, sender.misuse) == (1, [])
