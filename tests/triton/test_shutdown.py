"""Ends: by signal, by the engine's death, by the server's death. Nothing is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_engine import SEED_CRASH
from triton_server import TritonServer, fake_repository
from wire_client import GrpcStream, grpc_status, post, text_of, until

pytestmark = pytest.mark.triton


@pytest.fixture
def fresh(tmp_path: Path, tiny_model) -> Iterator[TritonServer]:
    environment = {
        "MORPH_MODEL": str(tiny_model),
        "MORPH_MODEL_REPOSITORY": str(fake_repository(tmp_path / "repository")),
        "FAKE_STEP_MS": "10",
        "MORPH_DRAIN_S": "20",
        **getattr(fresh, "extra", {}),
    }
    server = TritonServer(tmp_path, environment)
    try:
        yield server.wait_ready().wait_metrics()
    finally:
        server.stop()


def nothing_left(server: TritonServer) -> None:
    until(lambda: not server.family(), 10.0, "the end of all processes")
    assert [p.name for p in server.log.parent.iterdir() if p.name.startswith("morphserve-")] == []
    assert [p for p in Path("/dev/shm").iterdir() if p.name in shm_names(server)] == []


def shm_names(server: TritonServer) -> set[str]:
    return {p.name for p in Path("/dev/shm").glob("morphserve-*") if not run_folder_lives(p.name)}


def run_folder_lives(name: str) -> bool:
    folder = name.rsplit("_", 1)[0]
    return any(folder in entry for entry in running_run_folders())


def running_run_folders() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().decode("utf-8", "replace").split("\0")
            except OSError:
                continue
            found += [v for v in variables if v.startswith("MORPH_RUN_DIR=")]
    return found


def test_sigterm_lets_an_open_stream_end(fresh: TritonServer) -> None:
    stream = GrpcStream(fresh).ask("hello world", {"max_tokens": 150})
    stream.next()
    fresh.process.send_signal(signal.SIGTERM)
    responses = stream.rest()
    assert not responses[-1].error and len(text_of(responses)) > 300
    assert fresh.process.wait(30) == 0
    nothing_left(fresh)


def test_requests_are_refused_while_draining(fresh: TritonServer) -> None:
    stream = GrpcStream(fresh).ask("hello world", {"max_tokens": 300})
    stream.next()
    fresh.process.send_signal(signal.SIGTERM)
    until(lambda: post(fresh, {"text_input": "abc", "max_tokens": 1})[0] != 200, 5.0, "a refusal")
    assert post(fresh, {"text_input": "abc"})[1]["error"] == "The server is shutting down."
    assert grpc_status(fresh, "abc") == "UNAVAILABLE"
    assert not stream.rest()[-1].error
    assert fresh.process.wait(30) == 0


def test_an_idle_grpc_stream_does_not_keep_the_server_alive(fresh: TritonServer) -> None:
    idle = GrpcStream(fresh)
    assert text_of(GrpcStream(fresh).ask("abc", {"max_tokens": 2}).rest()) == "ab"
    fresh.process.send_signal(signal.SIGINT)
    assert fresh.process.wait(30) == 0
    nothing_left(fresh)
    idle.close()


def test_a_second_signal_cuts_the_drain_short(fresh: TritonServer) -> None:
    stream = GrpcStream(fresh).ask("hello world", {"max_tokens": 500})
    stream.next()
    fresh.process.send_signal(signal.SIGTERM)
    until(lambda: "draining" in fresh.output(), 5.0)
    fresh.process.send_signal(signal.SIGTERM)
    assert fresh.process.wait(30) == 0
    nothing_left(fresh)


def test_a_dead_engine_ends_every_stream_with_an_error(fresh: TritonServer) -> None:
    streams = [GrpcStream(fresh).ask("hello world", {"max_tokens": 400}) for _ in range(5)]
    for stream in streams:
        stream.next()
    GrpcStream(fresh).ask("crash", {"seed": SEED_CRASH})
    for stream in streams:
        last = stream.rest(10.0)[-1]
        assert "Model is unavailable due to unhealthy vLLM engine: The engine process ended unexpectedly." in last.error
    status, body = post(fresh, {"text_input": "abc"})
    assert status >= 400 and "unhealthy vLLM engine" in body["error"]
    assert grpc_status(fresh, "abc") == "UNAVAILABLE"
    assert fresh.process.wait(20) == 1
    assert "The server ends because its engine has: The engine process ended unexpectedly." in fresh.output()
    nothing_left(fresh)


def test_a_killed_server_leaves_no_stub(fresh: TritonServer) -> None:
    family = fresh.family()
    server = next(p for p in family if Path(f"/proc/{p}/comm").read_text().strip() == "tritonserver")
    os.kill(server, signal.SIGKILL)
    assert fresh.process.wait(20) == 1
    assert "Triton has died (exit status -9)." in fresh.output()
    nothing_left(fresh)


def test_a_killed_launcher_leaves_nothing(fresh: TritonServer) -> None:
    fresh.process.kill()
    fresh.process.wait()
    until(lambda: not fresh.family(), 20.0, "the end of all processes")
