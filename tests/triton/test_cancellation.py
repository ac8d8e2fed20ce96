"""Clients that leave: their requests end though nothing else would end them, the others do not notice.

The server is held meanwhile: only a cancellation ends a request then. How fast: bench/reliability.
"""

from __future__ import annotations

import threading

import pytest

from triton_server import TritonServer
from wire_client import GrpcStream, open_sse, pending, post, sse_events, text_of, until

pytestmark = pytest.mark.triton


def running(server: TritonServer) -> float:
    return server.metric("vllm:num_requests_running")


def cancelled(server: TritonServer) -> float:
    return server.metric("morph_requests_total", outcome="cancelled")


def test_a_cancelled_grpc_stream_frees_its_place(server: TritonServer) -> None:
    until(lambda: running(server) == 0)
    before = cancelled(server)
    with server.hold():
        stream = GrpcStream(server).ask("hello world", {"max_tokens": 500})
        stream.next()
        stream.cancel()
        until(lambda: cancelled(server) == before + 1, what="the cancellation")
        until(lambda: running(server) == 0)


def test_a_dropped_sse_client_frees_its_place(server: TritonServer) -> None:
    before = cancelled(server)
    connection, answer = open_sse(server, "hello world", max_tokens=500)
    next(sse_events(answer))
    answer.close()
    connection.close()
    until(lambda: cancelled(server) == before + 1, what="the cancellation")
    until(lambda: running(server) == 0)


def test_cancelled_while_it_waits_for_a_credit(server: TritonServer) -> None:
    before = cancelled(server)
    with server.hold():
        busy = [GrpcStream(server).ask("hello world", {"max_tokens": 200}) for _ in range(8)]
        for stream in busy:
            stream.next()
        waiting = [GrpcStream(server).ask("waiting", {"max_tokens": 5}) for _ in range(3)]
        until(lambda: server.metric("morph_execute_waiting") == 1, what="a request held in execute()")
        for stream in waiting:
            stream.cancel()
        until(lambda: cancelled(server) >= before + 2, what="the cancellations")
    assert all(len(text_of(s.rest())) > 400 for s in busy)
    assert post(server, {"text_input": "abc", "max_tokens": 2})[0] == 200


def test_forty_cancelled_at_once_in_the_queue_leave_nothing_behind(server: TritonServer) -> None:
    until(lambda: running(server) == 0)
    with server.hold():
        busy = [GrpcStream(server).ask("hello world", {"max_tokens": 20}) for _ in range(8)]
        for stream in busy:
            stream.next()
        queued = [GrpcStream(server).ask("queued", {"max_tokens": 1}) for _ in range(40)]
        until(lambda: pending(server) >= 30, what="the queue")  # the others are in the engine's line and in execute()
        for stream in queued:
            stream.cancel()
    assert not any(stream.rest()[-1].error for stream in busy)
    assert post(server, {"text_input": "abc", "max_tokens": 2})[0] == 200
    until(lambda: pending(server) == 0, what="the queue to be empty")
    until(lambda: server.metric("morph_execute_waiting") == 0 == running(server), what="all to be free")


def test_polling_throughout_with_64_streams(server: TritonServer) -> None:
    """Polls meet final responses all the time; calling is_cancelled() after FINAL would crash the server."""
    results: list[str] = []

    def one(number: int) -> None:
        for turn in range(4):
            stream = GrpcStream(server).ask("hello world", {"max_tokens": 3 + (number + turn) % 17})
            if (number + turn) % 5 == 4:
                stream.next()
                stream.cancel()
                results.append("cancelled")
            else:
                responses = stream.rest()
                results.append(responses[-1].error or text_of(responses))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert len(results) == 256
    assert [r for r in results if not (r == "cancelled" or r.startswith("hello"))] == []
    assert server.alive()
    until(lambda: running(server) == 0)
    until(lambda: server.metric("morph_execute_waiting") == 0)
