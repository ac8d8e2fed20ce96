"""The processes of `morph openai`: replaced when they end, ended with the one that has started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from morph_client.openai import workers

ROOT = Path(workers.__file__).resolve().parents[2]
SCRIPT = """
import os, pathlib, signal, sys
from morph_client.errors import ServerError
from morph_client.openai.workers import Workers

folder = pathlib.Path(sys.argv[1])

def work():
    if sys.argv[2] == "fail":
        raise RuntimeError("no luck")
    (folder / str(os.getpid())).touch()
    signal.pause()

try:
    Workers(work, 2, shortest_life_s=float(sys.argv[3])).run()
except ServerError as error:
    sys.exit(str(error))
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(how: str, shortest_life_s: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), how, str(shortest_life_s)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(folder: Path) -> set[int]:
    """The workers that have begun and not ended."""
    return {int(path.name) for path in folder.iterdir() if running(int(path.name))}


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_that_is_killed_is_replaced_and_the_end_ends_all(tmp_path: Path, start: Start) -> None:
    process = start("serve", 0.0)
    until(lambda: len(alive(tmp_path)) == 2)
    first = alive(tmp_path)
    os.kill(min(first), signal.SIGKILL)
    until(lambda: len(alive(tmp_path) - first) == 1)
    process.terminate()
    assert process.wait(30) == 0 and not alive(tmp_path)
    assert process.stderr is not None
    assert process.stderr.read() == "morph: a worker was ended by SIGKILL; another one takes its place\n"


def test_a_worker_that_cannot_start_ends_all_with_one_sentence(start: Start) -> None:
    process = start("fail", 3600.0)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and "RuntimeError: no luck" in said
    assert said.splitlines()[-1] == "a worker ended with status 1 right after its start"


def test_the_workers_end_with_the_process_that_has_started_them(tmp_path: Path, start: Start) -> None:
    process = start("serve", 0.0)
    until(lambda: len(alive(tmp_path)) == 2)
    process.kill()
    until(lambda: not alive(tmp_path))
