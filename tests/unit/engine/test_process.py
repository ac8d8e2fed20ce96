"""The engine in its own process: tokens come back, errors are sentences, and neither side outlives the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.conftest import make_model, run_all, submit
from morph_runtime.config import EngineConfig
from morph_runtime.engine import client as client_module
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.client import EngineClient
from morph_runtime.engine.messages import EngineStats, SamplingParams, StepOutput, Submit
from morph_runtime.engine.wire import FrameReader
from morph_runtime.errors import ConfigError, EngineDown

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


class Recorder:
    """A listener that remembers, and can be waited for."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, str] = {}
        self.stats: list[EngineStats] = []
        self.down: list[str] = []

    def on_step(self, out: StepOutput) -> None:
        with self.condition:
            for delta in out.tokens:
                self.tokens.setdefault(delta.key, []).extend(delta.tokens)
            for end in out.finished:
                self.finished[end.key] = end.reason
            self.condition.notify_all()

    def on_stats(self, stats: EngineStats) -> None:
        with self.condition:
            self.stats.append(stats)
            self.condition.notify_all()

    def on_down(self, reason: str) -> None:
        with self.condition:
            self.down.append(reason)
            self.condition.notify_all()

    def wait(self, what: object) -> None:
        with self.condition:
            assert self.condition.wait_for(what, timeout=100)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), kv_heads=2)


def config_for(folder: Path, overlap: str = "off", **memory: object) -> EngineConfig:
    return EngineConfig.from_mapping(
        {
            "overlap": overlap,
            "model": {"path": str(folder), "dtype": "float32"},
            "memory": {"kv_tokens": 512, **memory},
            "morph": {"mode": "off", "costs": "off"},
        }
    )


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(params=["off", "on"], ids=["one by one", "overlap"])
def client(request: pytest.FixtureRequest, folder: Path, recorder: Recorder) -> Iterator[EngineClient]:
    made = EngineClient(config_for(folder, request.param), recorder, python=sys.executable)
    made.start(110)
    yield made
    made.close()


def test_tokens_are_those_of_an_engine_in_this_process(folder: Path, recorder: Recorder, client: EngineClient) -> None:
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6], [5] * 30]
    for key, prompt in enumerate(prompts):
        client.submit(Submit(key=key, prompt=prompt, sampling=GREEDY))
    recorder.wait(lambda: len(recorder.finished) == 3)
    local = build_engine(config_for(folder))
    for key, prompt in enumerate(prompts):
        submit(local, key, prompt, 20)
    assert recorder.tokens == run_all(local)
    assert set(recorder.finished.values()) == {"length"}
    local.close()


def test_a_cancelled_request_is_acknowledged_and_its_blocks_are_free(recorder: Recorder, client: EngineClient) -> None:
    for key in range(10):  # a busy machine may let one end before we come to cancel it
        client.submit(Submit(key=key, prompt=[1, 2, 3], sampling=SamplingParams(max_tokens=200, ignore_eos=True)))
        recorder.wait(lambda key=key: len(recorder.tokens.get(key, [])) >= 2)
        client.cancel(key)
        recorder.wait(lambda key=key: key in recorder.finished)
        if recorder.finished[key] == "cancelled":
            break
    assert recorder.finished[key] == "cancelled"
    recorder.wait(lambda: recorder.stats and recorder.stats[-1].kv_blocks_used == 0)


def test_a_killed_engine_is_reported_once_and_refuses_further_work(recorder: Recorder, client: EngineClient) -> None:
    client.submit(Submit(key=1, prompt=[1, 2, 3], sampling=SamplingParams(max_tokens=200, ignore_eos=True)))
    recorder.wait(lambda: recorder.tokens.get(1))
    os.kill(client.pid, signal.SIGKILL)
    recorder.wait(lambda: recorder.down)
    with pytest.raises(EngineDown):
        client.submit(Submit(key=2, prompt=[1], sampling=GREEDY))
    assert len(recorder.down) == 1


def test_an_orderly_close_lets_running_requests_finish_and_is_no_crash(
    recorder: Recorder, client: EngineClient
) -> None:
    client.submit(Submit(key=1, prompt=[1, 2, 3], sampling=GREEDY))
    client.close(drain_s=100)
    assert recorder.finished == {1: "length"}
    assert recorder.down == []


def test_an_engine_that_is_closed_while_it_starts_is_down_and_gone(
    folder: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = EngineClient(config_for(folder), recorder, python=sys.executable)
    receive = FrameReader.receive

    def closed_meanwhile(reader: FrameReader[Any]) -> Any:
        message = receive(reader)
        made.close()  # as another thread may at any moment
        return message

    monkeypatch.setattr(FrameReader, "receive", closed_meanwhile)
    with pytest.raises(EngineDown):
        made.start(110)
    assert not Path(f"/proc/{made.pid}").exists()
    assert recorder.down == []


@pytest.mark.parametrize(
    ("end", "outside"),
    [("kill -KILL $$", True), ("kill -TERM $$", True), ("kill -SEGV $$", False), ("exit 1", False), ("exit 0", False)],
)
def test_a_start_that_somebody_has_ended_is_told_from_one_that_fails_of_itself(
    folder: Path, recorder: Recorder, tmp_path: Path, end: str, outside: bool
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{end}\n")
    python.chmod(0o755)
    made = EngineClient(config_for(folder), recorder, python=str(python))
    with pytest.raises(EngineDown, match=r"ended while starting \(exit status"):
        made.start(110)
    assert made.ended_from_outside is outside


SLOW_TO_EXIT = """
import signal, socket, sys
from morph_runtime.engine.messages import EngineFailure, EngineInfo
from morph_runtime.engine.wire import FrameWriter
writer = FrameWriter(socket.socket(fileno=int(sys.argv[-1])))
writer.send(EngineInfo("m", "a", "cpu", "float32", 1, 10, [], 8, 1, 4, "float32", 8, 0, [], 1, 0.0))
writer.send(EngineFailure("The engine has failed: it hurts."))
signal.pause()
"""


def test_an_engine_that_has_failed_is_down_at_once_however_slowly_it_exits(
    folder: Path, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "KILL_AFTER_S", 0.1)
    script, python = tmp_path / "engine.py", tmp_path / "python"
    script.write_text(SLOW_TO_EXIT)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    made = EngineClient(config_for(folder), recorder, python=str(python))
    made.start(110)
    try:
        recorder.wait(lambda: recorder.down)
        assert recorder.down == ["The engine has failed: it hurts."]
        assert Path(f"/proc/{made.pid}").exists()
    finally:
        made.close()
    assert not Path(f"/proc/{made.pid}").exists() and not made.ended_from_outside
    assert len(recorder.down) == 1


def test_a_process_that_cannot_be_started_is_a_start_that_has_failed(folder: Path, recorder: Recorder) -> None:
    """So it is tried again: where memory or descriptors are short, they may not be a second later."""
    made = EngineClient(config_for(folder), recorder, python="/nonexistent/python")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EngineDown, match=r"^The engine process could not be started: .*/nonexistent/python"):
        made.start(110)
    assert len(os.listdir("/proc/self/fd")) == before and not made.ended_from_outside
    made.close()


def test_a_budget_that_cannot_hold_the_model_is_one_sentence_with_the_least_that_can(
    folder: Path, recorder: Recorder
) -> None:
    made = EngineClient(config_for(folder, budget_gib=0.0005), recorder, python=sys.executable)
    with pytest.raises(ConfigError, match=r"memory\.budget_gib is 0.0005, but this model needs at least 0\.\d+ GiB"):
        made.start(110)


def test_a_missing_model_folder_is_one_sentence(recorder: Recorder) -> None:
    made = EngineClient(config_for(Path("/nonexistent/model")), recorder, python=sys.executable)
    with pytest.raises(ConfigError, match=r"'/nonexistent/model' does not exist"):
        made.start(110)


def test_the_engine_ends_when_its_parent_is_killed(folder: Path) -> None:
    script = f"""
import sys
from morph_runtime.engine.client import EngineClient
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from engine.test_process import Recorder, config_for
from pathlib import Path
client = EngineClient(config_for(Path({str(folder)!r})), Recorder(), python=sys.executable)
client.start(110)
print(client.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert parent.stdout is not None
    engine_pid = int(parent.stdout.readline())
    descriptor = os.pidfd_open(engine_pid)
    parent.kill()
    parent.wait()
    ended = threading.Event()
    threading.Thread(target=lambda: (_wait_for_exit(descriptor), ended.set()), daemon=True).start()
    assert ended.wait(100), "the engine outlived its parent"


def _wait_for_exit(descriptor: int) -> None:
    import select

    select.select([descriptor], [], [])
