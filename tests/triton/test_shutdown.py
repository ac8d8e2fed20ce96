"""Ends: by signal, by the engine's death, by the server's death. Nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from morph_backend.launcher.run_folder import sweep_stale
from triton_server import TritonServer, fake_repository
from wire_client import GrpcStream, grpc_status, post, text_of, until

pytestmark = pytest.mark.triton


@pytest.fixture
def fresh(tmp_path: Path, tiny_model) -> Iterator[TritonServer]:
    environment = {
        "MORPH_MODEL": str(tiny_model),
        "MORPH_MODEL_REPOSITORY": str(fake_repository(tmp_path / "repository")),
        "FAKE_STEP_MS": "10",
        "MORPH_DRAIN_S": "600",
        **getattr(fresh, "extra", {}),
    }
    server = TritonServer(tmp_path, environment)
    try:
        yield server.wait_ready().wait_metrics()
    finally:
        server.stop()
        end_all(server)


@pytest.fixture
def fresh_real(tmp_path: Path) -> Iterator[TritonServer]:
    """The product as it ships: the engine is a process of its own."""
    server = TritonServer(tmp_path, {"MORPH_MAX_NUM_SEQS": "4"})
    try:
        yield server.wait_ready(120).wait_metrics()
    finally:
        server.stop()
        end_all(server)


def end_all(server: TritonServer) -> None:
    """What a failed test has left; a launcher that was killed ends nothing."""
    for process in server.family():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def nothing_left(server: TritonServer) -> None:
    until(lambda: not server.family(), what="the end of all processes")
    assert [p.name for p in server.log.parent.iterdir() if p.name.startswith("morphserve-")] == []
    assert server.shared_memory() == []


def test_sigterm_lets_an_open_stream_end(fresh: TritonServer) -> None:
    stream = GrpcStream(fresh).ask("hello world", {"max_tokens": 150})
    stream.next()
    fresh.process.send_signal(signal.SIGTERM)
    responses = stream.rest()
    assert not responses[-1].error and len(text_of(responses)) > 300
    assert fresh.process.wait(100) == 0
    nothing_left(fresh)


def test_requests_are_refused_while_draining(fresh: TritonServer) -> None:
    with fresh.hold():
        stream = GrpcStream(fresh).ask("hello world", {"max_tokens": 20})
        stream.next()
        fresh.process.send_signal(signal.SIGTERM)
        until(lambda: post(fresh, {"text_input": "abc", "max_tokens": 1})[0] != 200, what="a refusal")
        status, body = post(fresh, {"text_input": "abc"})  # Triton 2.51 spells every error of a model 400
        assert status >= 400 and body == {"error": "The server is shutting down."}
    assert not stream.rest()[-1].error
    assert fresh.process.wait(100) == 0


def test_each_refusal_has_its_grpc_status(fresh: TritonServer) -> None:
    """Last of all on a server of its own: Triton 2.51 may crash once it has given one."""
    assert grpc_status(fresh, "")[0] == "INVALID_ARGUMENT"
    with fresh.hold():
        GrpcStream(fresh).ask("hello world", {"max_tokens": 20}).next()
        fresh.process.send_signal(signal.SIGTERM)
        until(lambda: post(fresh, {"text_input": "abc", "max_tokens": 1})[0] != 200, what="a refusal")
        code, words = grpc_status(fresh, "abc")
        assert code == "UNAVAILABLE" and "The server is shutting down." in words


def test_an_idle_grpc_stream_does_not_keep_the_server_alive(fresh: TritonServer) -> None:
    idle = GrpcStream(fresh)
    assert text_of(GrpcStream(fresh).ask("abc", {"max_tokens": 2}).rest()) == "ab"
    fresh.process.send_signal(signal.SIGINT)
    assert fresh.process.wait(100) == 0
    nothing_left(fresh)
    idle.close()


def test_a_second_signal_cuts_the_drain_short(fresh: TritonServer) -> None:
    with fresh.hold():  # so the drain would last for its whole limit
        stream = GrpcStream(fresh).ask("hello world", {"max_tokens": 500})
        stream.next()
        fresh.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in fresh.output())
        fresh.process.send_signal(signal.SIGTERM)
        assert fresh.process.wait(100) == 0
    nothing_left(fresh)


def test_a_killed_server_leaves_no_stub(fresh: TritonServer) -> None:
    family = fresh.family()
    server = next(p for p in family if Path(f"/proc/{p}/comm").read_text().strip() == "tritonserver")
    os.kill(server, signal.SIGKILL)
    assert fresh.process.wait(100) == 1
    assert "Triton has died (exit status -9)." in fresh.output()
    nothing_left(fresh)


def test_a_killed_launcher_leaves_nothing(fresh: TritonServer) -> None:
    fresh.process.kill()
    fresh.process.wait()
    until(lambda: not fresh.family(), what="the end of all processes")
    assert fresh.shared_memory() == []


def test_a_dead_stub_ends_the_server_and_with_it_every_stream(fresh: TritonServer) -> None:
    stream = GrpcStream(fresh).ask("hello world", {"max_tokens": 500})
    stream.next()
    (stub,) = (p for p in fresh.family() if "python_backend_stub" in Path(f"/proc/{p}/cmdline").read_text())
    os.kill(stub, signal.SIGKILL)
    assert stream.rest()[-1].error, "Triton alone would leave it hanging"
    assert fresh.process.wait(100) == 1
    assert "The server ends because the process that runs its model has died." in fresh.output()
    nothing_left(fresh)


def test_when_launcher_and_server_are_killed_no_process_stays(fresh_real: TritonServer) -> None:
    kill_launcher_and_server(fresh_real)
    until(lambda: not fresh_real.family(), what="the end of all processes")


def kill_launcher_and_server(server: TritonServer) -> None:
    """Nobody is left to clean up; the launcher goes first, or it would."""
    triton = next(p for p in server.family() if Path(f"/proc/{p}/comm").read_text().strip() == "tritonserver")
    server.process.kill()
    os.kill(triton, signal.SIGKILL)
    server.process.wait()


def test_when_both_are_killed_amid_responses_the_engine_ends_too(
    fresh_real: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"max_tokens": 400, "ignore_eos": True}
    streams = [GrpcStream(fresh_real).ask("hello world", given) for _ in range(4)]
    for stream in streams:
        stream.next()
    assert len(fresh_real.family()) == 3, "tritonserver, the stub and the engine"
    kill_launcher_and_server(fresh_real)
    until(lambda: not fresh_real.family(), what="the end of all processes")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sweep_stale()  # as at the next start; it spares what a living process may still use
    nothing_left(fresh_real)


@pytest.fixture
def crowded(tmp_path: Path, tiny_model) -> Iterator[TritonServer]:
    """64 sequences at a time and 2 s to drain."""
    environment = {
        "MORPH_MODEL": str(tiny_model),
        "MORPH_MODEL_REPOSITORY": str(fake_repository(tmp_path / "repository")),
        "MORPH_MAX_NUM_SEQS": "64",
        "FAKE_STEP_MS": "40",
        "MORPH_DRAIN_S": "2",
    }
    server = TritonServer(tmp_path, environment)
    try:
        yield server.wait_ready().wait_metrics()
    finally:
        server.stop()


def test_sigterm_ends_64_streams_properly_within_the_grace_period(crowded: TritonServer) -> None:
    lengths = [8 + 7 * index for index in range(64)]  # 0.3 s to 18 s
    streams = [GrpcStream(crowded).ask("abc", {"max_tokens": length}) for length in lengths]
    for stream in streams:
        stream.next()
    crowded.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    complete = 0
    longest_s = 0.040 * max(lengths)  # what the longest needs at the least
    for stream, length in zip(streams, lengths, strict=True):
        error = stream.rest()[-1].error
        assert error in ("", "The server is shutting down.")
        if not error:
            complete += 1
            assert len(text_of(stream.responses)) == length
    assert 1 <= complete < 64
    assert time.monotonic() - began < longest_s
    assert crowded.process.wait(100) == 0
    nothing_left(crowded)
