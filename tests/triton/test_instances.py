"""Several instances of the model: processes that read, detokenize and send side by side, with one engine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_crash import engine_of
from triton_server import TritonServer, fake_repository, real_repository
from wire_client import GrpcStream, text_of, until

pytestmark = pytest.mark.triton

INSTANCES = 3
STREAMS = 24
TOKENS = 20


def serving_processes(server: TritonServer) -> list[int]:
    """The instances' process ids, the owner's first: it alone is known to the launcher."""
    (run,) = server.log.parent.glob("morphserve-*")
    owner = json.loads((run / "ready").read_text())["pid"]
    found = [pid for pid in server.family() if b"backend_stub" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(found) == INSTANCES
    return [owner, *(pid for pid in found if pid != owner)]


@pytest.fixture
def several(tmp_path: Path, tiny_model: Path) -> Iterator[TritonServer]:
    environment = {
        "MORPH_MODEL": str(tiny_model),
        "MORPH_MODEL_REPOSITORY": str(fake_repository(tmp_path / "repository", instances=INSTANCES)),
        "MORPH_MAX_NUM_SEQS": str(STREAMS),
        "MORPH_DRAIN_S": "600",
    }
    server = TritonServer(tmp_path, environment)
    try:
        yield server.wait_ready().wait_metrics()
    finally:
        server.stop()


def opened(server: TritonServer) -> list[GrpcStream]:
    """Streams that have their first token."""
    sampling = {"max_tokens": TOKENS, "ignore_eos": True}
    streams = [GrpcStream(server).ask(f"stream {at}", sampling) for at in range(STREAMS)]
    for stream in streams:
        assert not stream.next().error
    return streams


def test_instances_share_the_engine_wait_for_nobody_but_it_and_drain_together(several: TritonServer) -> None:
    _owner, branch, _other = serving_processes(several)
    with several.hold():
        streams = opened(several)
        os.kill(branch, signal.SIGSTOP)  # what it serves stands still, and nothing else
    until(lambda: several.metric("vllm:num_requests_running") == 0, what="the engine, which has done with all")
    # Triton gives requests to whichever instance is idle: of 24, all to one or none to it would be no spread at all.
    until(lambda: any(stream.ended.is_set() for stream in streams), what="the others' streams")
    assert not all(stream.ended.is_set() for stream in streams)
    os.kill(branch, signal.SIGCONT)
    for at, stream in enumerate(streams):
        answers = stream.rest()
        assert not any(answer.error for answer in answers)
        assert text_of(answers).startswith(f"stream {at}"), "another stream's text"
    until(lambda: several.metric("morph_requests_total", outcome="length") == STREAMS, what="the count of all")
    assert several.metric("vllm:generation_tokens_total") == STREAMS * TOKENS
    assert several.metric("vllm:prompt_tokens_total") > 0 and several.metric("morph_backend_errors_total") == 0
    _sigterm_lets_all_streams_end(several)


def _sigterm_lets_all_streams_end(several: TritonServer) -> None:
    with several.hold():
        streams = opened(several)
        several.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in several.output(), what="the drain")
    for stream in streams:
        assert not any(answer.error for answer in stream.rest())
    assert several.process.wait(60) == 0
    assert not several.family() and not several.shared_memory()


def test_an_instance_that_is_killed_ends_the_server_with_a_sentence(several: TritonServer) -> None:
    branch = serving_processes(several)[1]
    with several.hold():
        streams = opened(several)
        os.kill(branch, signal.SIGKILL)
        for stream in streams:
            stream.rest()  # each of them ends
    assert several.process.wait(60) == 1
    assert f"A serving process of the model ({branch}) has ended." in several.output()
    until(lambda: not several.family(), what="the end of all processes")
    assert not several.shared_memory()


def test_a_start_that_fails_is_told_once_and_soon(tmp_path: Path, tiny_model: Path) -> None:
    sentence = "model_path: there is nothing to be loaded."
    environment = {
        "MORPH_MODEL": str(tiny_model),
        "MORPH_MODEL_REPOSITORY": str(fake_repository(tmp_path / "repository", instances=INSTANCES)),
        "FAKE_START_ERROR": sentence,
    }
    server = TritonServer(tmp_path, environment)
    try:
        assert server.process.wait(60) == 1
        assert sentence in server.output() and "Traceback" not in server.output()
    finally:
        server.stop()


def test_streams_of_all_instances_go_on_after_the_engines_end(tmp_path: Path) -> None:
    environment = {
        "MORPH_MODEL_REPOSITORY": str(real_repository(tmp_path / "repository", instances=INSTANCES)),
        "MORPH_DTYPE": "float32",
        "MORPH_MODE": "off",
        "MORPH_MAX_NUM_SEQS": "8",
    }
    server = TritonServer(tmp_path, environment)
    sampling = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    prompts = [f"Chapter {at}. It was" for at in range(6)]
    try:
        server.wait_ready(120).wait_metrics()
        calm = [GrpcStream(server).ask(prompt, sampling) for prompt in prompts]
        expected = [text_of(stream.rest()) for stream in calm]
        streams = [GrpcStream(server).ask(prompt, sampling) for prompt in prompts]
        for stream in streams:
            stream.next()
        os.kill(engine_of(server), signal.SIGKILL)
        assert [text_of(stream.rest()) for stream in streams] == expected
        assert server.metric("morph_engine_restarts_total") == 1
        assert server.stop() == 0, server.output()
    finally:
        server.stop()
