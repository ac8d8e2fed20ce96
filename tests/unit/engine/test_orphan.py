"""The engine ends a serving process that its dead server has left behind, and no other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from morph_runtime.engine.orphan import parent_of

GUARD = """
import sys
from morph_runtime.engine.orphan import OrphanGuard
OrphanGuard(int(sys.argv[1]), patience_s=0.1, interval_s=0.02).run()
"""
SERVING = """
import os, subprocess, sys, time
guard = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getppid())])
print(os.getpid(), guard.pid, flush=True)
time.sleep(300)  # as one that no thread of can run
"""
SERVER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
time.sleep(300)
"""


@pytest.fixture
def family() -> Iterator[Callable[[], tuple[subprocess.Popen[str], int, int]]]:
    """Starts server, serving process and guard."""
    made: list[tuple[subprocess.Popen[str], int, int]] = []

    def start() -> tuple[subprocess.Popen[str], int, int]:
        command = [sys.executable, "-c", SERVER, SERVING, GUARD]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        serving, guard = map(int, server.stdout.readline().split())
        made.append((server, serving, guard))
        return made[-1]

    yield start
    for server, *others in made:
        server.kill()
        server.wait()
        for process in others:
            if alive(process):
                os.kill(process, 9)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, within_s: float = 60.0) -> bool:
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def test_a_serving_process_goes_when_its_server_has_died_and_not_before(family: Callable[..., tuple]) -> None:
    server, serving, guard = family()
    assert not gone(serving, 1.0) and alive(guard)
    server.kill()
    server.wait()
    assert gone(serving) and gone(guard)


def test_a_guard_ends_when_the_serving_process_has_gone(family: Callable[..., tuple]) -> None:
    server, serving, guard = family()
    os.kill(serving, 9)
    assert gone(guard) and server.poll() is None


def test_the_parent_of_a_process() -> None:
    assert parent_of(os.getpid()) == os.getppid()
    assert parent_of(2**22 + 1) == 0
