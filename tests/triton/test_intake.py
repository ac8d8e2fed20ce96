"""Many requests at once: each is taken from Triton's queue, by urgency, and none is left there."""

from __future__ import annotations

import pytest

from triton_server import TritonServer
from wire_client import GrpcStream, pending, until

pytestmark = pytest.mark.triton
MANY = 200
ENDED_BEFORE = 100
"""Far more than those that the engine runs, holds in its line and takes at once when they end (8 each, at most)."""


def test_two_hundred_queued_requests_are_all_served_and_the_urgent_one_does_not_wait_for_them(
    server: TritonServer,
) -> None:
    with server.hold():
        many = GrpcStream(server)
        for _ in range(MANY):
            many.ask("low", {"max_tokens": 2}, priority=3)
        # The engine runs 8 and has 2 in its line, execute() holds one.
        until(lambda: pending(server) == MANY - 11, what="the pending count")
        urgent = GrpcStream(server).ask("high", {"max_tokens": 2}, priority=1)
        until(lambda: pending(server) == MANY - 10, what="the pending count with the urgent request")
    ended_s = urgent.started_s + urgent.rest()[-1].at_s
    finals = []
    while len(finals) < MANY:
        response = many.next()
        assert not response.error
        if response.final:
            finals.append(many.started_s + response.at_s)
    many.close()
    assert not urgent.responses[-1].error
    assert sum(at_s < ended_s for at_s in finals) < ENDED_BEFORE
    until(lambda: pending(server) == 0, what="an empty queue")
