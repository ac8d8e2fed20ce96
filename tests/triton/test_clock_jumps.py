"""The wall clock is set while requests run, wait and are recomputed: nothing changes, for time is counted monotonic."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from false_clock import MISSING, FalseClock, library
from morph_backend.health import page_complaint
from test_crash import engine_of
from triton_server import TritonServer
from wire_client import GrpcStream, sse, text_of, until

pytestmark = [pytest.mark.triton, pytest.mark.skipif(library() is None, reason=MISSING), pytest.mark.timeout(240)]

GREEDY = {"max_tokens": 160, "temperature": 0, "ignore_eos": True}
JUMPS_S = (3600, 90_000, 60, 86_400, 0)
"""Forwards by an hour and a day, back by a day, forwards by one, and back to the true time."""
HEARTBEAT = re.compile(r"^morph_engine_heartbeat_seconds\{[^}]*\} (\S+)$", re.M)


@pytest.fixture
def jumpy(tmp_path: Path) -> Iterator[tuple[TritonServer, FalseClock]]:
    preload = library()
    assert preload is not None
    clock = FalseClock(tmp_path, preload)
    settings = {"MORPH_DTYPE": "float32", "MORPH_MODE": "off", "MORPH_MAX_NUM_SEQS": "2"}
    server = TritonServer(tmp_path, {**settings, **clock.environment})
    try:
        yield server.wait_ready(120).wait_metrics(), clock
    finally:
        assert server.stop() == 0, server.output()


def jump(server: TritonServer, clock: FalseClock, offset_s: int) -> None:
    """Set the clock and wait until the server's heartbeat, which is wall time, shows it."""
    clock.set(offset_s)

    def seen() -> bool:
        beat = HEARTBEAT.search(server.metrics_text())
        return beat is not None and abs(float(beat[1]) - time.time() - offset_s) < 0.9

    until(seen, 30.0, f"a clock that is {offset_s} s off")


def test_streams_and_queue_do_not_notice_that_the_clock_is_set(jumpy: tuple[TritonServer, FalseClock]) -> None:
    server, clock = jumpy
    calm = text_of(GrpcStream(server).ask("The sea", GREEDY).rest(60))
    for number, offset_s in enumerate(JUMPS_S):
        # Two run, some wait in the engine's line, one in execute(), and the last in Triton's queue, for 60 s at most.
        streams = [GrpcStream(server).ask("The sea", GREEDY) for _ in range(8)]
        streams[0].next()
        jump(server, clock, offset_s)
        if number == 1:
            os.kill(engine_of(server), signal.SIGKILL)
        assert [text_of(stream.rest(100)) for stream in streams] == [calm] * 8
        assert [stream.responses[-1].error for stream in streams] == [""] * 8
        parameters = {key: value for key, value in GREEDY.items() if key != "max_tokens"}
        assert len(sse(server, "The sea", max_tokens=20, **parameters)) > 1
        until(lambda: server.metric("morph_engine_up") == 1, 30.0, "the engine")
        assert page_complaint(server.metrics_text(), time.time() + offset_s) == ""
    assert server.metric("morph_engine_restarts_total") == 1
    assert server.metric("morph_backend_errors_total") == 0
