"""What ends the engine process does not end its streams."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fake_engine import SEED_CRASH
from tiny_model import write_tiny_model
from triton_server import TritonServer, fake_repository, real_repository
from wire_client import GrpcStream, generate, pending, post, text_of, until

pytestmark = pytest.mark.triton

ENDS = "The server ends because it can serve nothing any more:"
GREEDY = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": {"max_tokens": 300, "seed": 5, "temperature": 1.2, "ignore_eos": True},
    "penalised": {**GREEDY, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "cut by a stop string": {**GREEDY, "stop": ["zzz", "\\n\\n"], "min_tokens": 5},
}


def engine_of(server: TritonServer) -> int:
    """The engine's process id; waits for one if it is being restarted."""
    found: list[int] = []

    def look() -> bool:
        found.clear()
        for pid in server.family():
            try:
                if b"morph_runtime.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
            except OSError:
                continue
        return len(found) == 1

    until(look, what="one engine process")
    return found[0]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The demo model in float32 at level 0: a run's text does not depend on its company."""
    folder = tmp_path_factory.mktemp("exact")
    environment = {
        "MORPH_MODEL_REPOSITORY": str(real_repository(folder / "repository", ENGINE_SILENCE_SECONDS="5")),
        "MORPH_DTYPE": "float32",
        "MORPH_MODE": "off",
        "MORPH_MAX_NUM_SEQS": "8",
    }
    server = TritonServer(folder, environment)
    try:
        yield server.wait_ready(120).wait_metrics()
    finally:
        assert server.stop() == 0, server.output()


def up(server: TritonServer) -> None:
    until(lambda: server.metric("morph_engine_up") == 1, what="the engine")


@pytest.fixture(scope="module")
def calm(exact: TritonServer) -> dict[str, str]:
    """What each of `SAMPLINGS` gives undisturbed."""
    streams = {name: GrpcStream(exact).ask("Once upon a time", sampling) for name, sampling in SAMPLINGS.items()}
    return {name: text_of(stream.rest(100)) for name, stream in streams.items()}


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP], ids=lambda blow: blow.name)
def test_streams_go_on_as_if_nothing_had_happened(
    exact: TritonServer, calm: dict[str, str], blow: signal.Signals
) -> None:
    restarts = exact.metric("morph_engine_restarts_total")
    streams = {
        name: GrpcStream(exact).ask("Once upon a time", sampling, return_recomputed_at=True, return_morph_level=True)
        for name, sampling in SAMPLINGS.items()
    }
    for stream in streams.values():
        for _ in range(5):
            stream.next()
    os.kill(engine_of(exact), blow)
    texts = {name: text_of(stream.rest(100)) for name, stream in streams.items()}
    assert [stream.responses[-1].error for stream in streams.values()] == [""] * 4
    assert texts == calm
    responses = streams["greedy"].responses
    (at,) = responses[-1].outputs["recomputed_at"]
    levels = [response.outputs["morph_level"] for response in responses]
    assert sum(map(len, levels)) == GREEDY["max_tokens"] > at >= sum(map(len, levels[:5]))
    up(exact)
    until(lambda: exact.metric("morph_engine_restarts_total") == restarts + 1)


def test_who_comes_while_the_engine_is_away_is_served_or_times_out_in_the_queue(exact: TritonServer) -> None:
    up(exact)
    os.kill(engine_of(exact), signal.SIGKILL)
    until(lambda: exact.metric("morph_engine_up") == 0, what="the engine's end")
    streams = [GrpcStream(exact).ask("The sea", {"max_tokens": 5, "temperature": 0}) for _ in range(6)]
    # Two have a credit and wait for the engine, one waits in execute() for a credit, the others in Triton's queue.
    until(lambda: pending(exact) == 3, what="a backlog")
    hasty = GrpcStream(exact).ask("The sea", {"max_tokens": 5}, timeout=200_000)
    texts = [text_of(stream.rest(100)) for stream in streams]
    assert len(set(texts)) == 1 and texts[0]
    assert "Request timeout expired" in hasty.rest(100)[-1].error
    assert generate(exact, "The sea", max_tokens=5, temperature=0)["text_output"] == texts[0]


def fake(folder: Path, tiny_model: Path, **settings: str) -> TritonServer:
    environment = {
        "MORPH_MODEL": str(tiny_model),
        "MORPH_MODEL_REPOSITORY": str(fake_repository(folder / "repository", **settings)),
        "FAKE_STEP_MS": "10",
    }
    return TritonServer(folder, environment)


def test_a_request_that_ends_the_engine_twice_ends_alone(tmp_path: Path, tiny_model: Path) -> None:
    server = fake(tmp_path, tiny_model)
    try:
        server.wait_ready().wait_metrics()
        streams = [GrpcStream(server).ask("hello world", {"max_tokens": 100}) for _ in range(3)]
        for stream in streams:
            stream.next()
        poison = GrpcStream(server).ask("crash", {"seed": SEED_CRASH}).rest()
        assert "ended the engine process twice" in poison[-1].error
        for stream in streams:
            assert text_of(stream.rest()).startswith("hello worldhello")
            assert not stream.responses[-1].error
        assert server.metric("morph_engine_restarts_total") == 2
        assert server.stop() == 0
    finally:
        server.stop()


def test_an_engine_that_is_given_up_ends_every_stream_and_the_server(tmp_path: Path, tiny_model: Path) -> None:
    server = fake(tmp_path, tiny_model, ENGINE_RESTARTS="0")
    try:
        server.wait_ready().wait_metrics()
        streams = [GrpcStream(server).ask("hello world", {"max_tokens": 400}) for _ in range(5)]
        for stream in streams:
            stream.next()
        GrpcStream(server).ask("crash", {"seed": SEED_CRASH})
        for stream in streams:
            last = stream.rest()[-1]
            assert (
                "Model is unavailable due to unhealthy vLLM engine: The engine process ended unexpectedly."
                in last.error
            )
        status, body = post(server, {"text_input": "abc"})
        assert status >= 400 and "unhealthy vLLM engine" in body["error"]
        until(lambda: server.metric("morph_engine_up") == 0)
        assert server.process.wait(100) == 1
        assert f"{ENDS} The engine process ended unexpectedly." in server.output()
        until(lambda: not server.family(), what="the end of all processes")
        assert not list(tmp_path.glob("morphserve-*"))
    finally:
        server.stop()


def test_who_waits_when_the_engine_is_given_up_gets_its_error(tmp_path: Path) -> None:
    """In the engine, in execute() and in Triton's queue."""
    environment = {
        "MORPH_MODEL_REPOSITORY": str(real_repository(tmp_path / "repository", ENGINE_RESTARTS="0")),
        "MORPH_MODE": "off",
        "MORPH_MAX_NUM_SEQS": "2",
    }
    server = TritonServer(tmp_path, environment)
    try:
        server.wait_ready(120).wait_metrics()
        streams = [GrpcStream(server).ask("The sea", {**GREEDY, "max_tokens": 1500}) for _ in range(12)]
        until(lambda: pending(server) >= 3, what="a backlog")
        os.kill(engine_of(server), signal.SIGKILL)
        lasts = [stream.rest(100)[-1] for stream in streams]
        assert all("unhealthy vLLM engine: The engine process ended" in last.error for last in lasts)
        assert server.process.wait(100) == 1
        assert f"{ENDS} The engine process ended unexpectedly." in server.output()
    finally:
        server.stop()


def test_a_front_end_that_takes_no_response_any_more_ends_the_server(tmp_path: Path) -> None:
    """As a lock-up inside Triton looks to the serving process; here tritonserver is stopped."""
    repository = fake_repository(tmp_path / "repository", SEND_SILENCE_SECONDS="1")
    environment = {
        "MORPH_MODEL": str(write_tiny_model(tmp_path / "model")),
        "MORPH_MODEL_REPOSITORY": str(repository),
    }
    server = TritonServer(tmp_path, environment)
    try:
        server.wait_ready().wait_metrics()
        stream = GrpcStream(server).ask("hello world", {"max_tokens": 400, "ignore_eos": True})
        stream.next()
        (triton,) = (child for child in psutil.Process(server.process.pid).children() if child.name() == "tritonserver")
        triton.suspend()
        until(lambda: f"{ENDS} Triton has not taken a response for 1 s" in server.output(), what="the launcher's word")
        triton.resume()
        assert "unhealthy vLLM engine: Triton has not taken a response" in stream.rest(100)[-1].error
        assert server.process.wait(100) == 1
        until(lambda: not server.family(), what="the end of all processes")
    finally:
        server.stop()
