"""Triton's queue is the queue: pending count, priorities, timeouts, its limit."""

from __future__ import annotations

import pytest

from triton_server import TritonServer
from wire_client import GrpcStream, fill, pending, post, text_of, until

pytestmark = pytest.mark.triton


def finish(streams: list[GrpcStream]) -> None:
    for stream in streams:
        assert not stream.rest()[-1].error


def test_the_backlog_is_tritons_pending_count(narrow: TritonServer) -> None:
    with narrow.hold():
        streams = fill(narrow)
        queued = [GrpcStream(narrow).ask("queued", {"max_tokens": 1}) for _ in range(4)]
        until(lambda: pending(narrow) == 4, what="the pending count")
    finish(streams + queued)
    until(lambda: pending(narrow) == 0)


def test_priority_1_overtakes_priority_3(narrow: TritonServer) -> None:
    with narrow.hold():
        streams = fill(narrow)
        low = [GrpcStream(narrow).ask("low", {"max_tokens": 40}, priority=3) for _ in range(3)]
        until(lambda: pending(narrow) == 3)
        high = GrpcStream(narrow).ask("high", {"max_tokens": 1}, priority=1)
        until(lambda: pending(narrow) == 4)
    done = {}
    for name, stream in (("high", high), ("low", low[0])):
        stream.rest()
        done[name] = stream.started_s + stream.responses[-1].at_s
    assert done["high"] < done["low"]
    finish([*streams, *low[1:]])


def test_a_timeout_in_the_queue(narrow: TritonServer) -> None:
    with narrow.hold():  # nothing but the timeout can end it
        streams = fill(narrow)
        late = GrpcStream(narrow).ask("late", {"max_tokens": 1}, timeout=300_000)
        (response,) = late.rest()
    assert "Request timeout expired" in response.error
    assert response.at_s > 0.25
    finish(streams)


def test_a_full_queue(narrow: TritonServer) -> None:
    with narrow.hold():
        streams = fill(narrow)
        queued = [GrpcStream(narrow).ask("queued", {"max_tokens": 1}) for _ in range(6)]
        until(lambda: pending(narrow) == 6)
        status, body = post(narrow, {"text_input": "one too many"})
    assert status == 503 and "Exceeds maximum queue size" in body["error"]
    finish(streams + queued)


def test_a_cancelled_request_leaves_the_queue(narrow: TritonServer) -> None:
    with narrow.hold():
        streams = fill(narrow)
        queued = GrpcStream(narrow).ask("queued", {"max_tokens": 1})
        until(lambda: pending(narrow) == 1)
        queued.cancel()
    finish(streams)
    until(lambda: pending(narrow) == 0)


def test_bad_input_behind_a_full_line_does_not_disturb(narrow: TritonServer) -> None:
    with narrow.hold():
        streams = fill(narrow)
        bad = GrpcStream(narrow).ask("bad", {"max_tokens": -2})
    finish(streams)
    assert "max_tokens" in bad.rest()[-1].error
    assert text_of(GrpcStream(narrow).ask("abc", {"max_tokens": 2}).rest()) == "ab"
