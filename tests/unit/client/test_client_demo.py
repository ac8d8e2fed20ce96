from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morph_client.errors import MorphError
from morph_client.ports import free_ports
from morph_client.server_process import EmbeddedServer, StartFailed

COMMAND = [sys.executable, "-c", "from morph_client.cli import main; main()", "demo", "--no-show", "--seconds", "3"]


def alive(group: int) -> bool:
    """Whether a process of the group runs; one that has ended and that nobody has asked for does not count."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(its_group) == group and state not in "ZX":
                    return True
    return False


@pytest.fixture
def server(launcher: Path, tmp_path: Path) -> EmbeddedServer:
    return EmbeddedServer("off", tmp_path / "server.log")


def test_ports_differ_and_are_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    sockets = [socket.create_server(("127.0.0.1", port)) for port in ports]
    for one in sockets:
        one.close()


def test_a_server_is_started_and_ended_with_its_whole_group(server: EmbeddedServer) -> None:
    with server:
        assert server.wait_ready(100) > 0
        assert server._process is not None
        group = server._process.pid
        assert alive(group)
    assert not alive(group)


@pytest.mark.parametrize(("fault", "says"), [("fails", r"exit code 3"), ("never-ready", "not ready within 1 s")])
def test_a_server_that_does_not_start_is_reported_with_its_last_words(
    launcher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    monkeypatch.setenv("MORPH_FAKE", fault)
    with EmbeddedServer("off", tmp_path / "server.log") as server, pytest.raises(StartFailed, match=says) as caught:
        server.wait_ready(1.0 if fault == "never-ready" else 100)
    assert isinstance(caught.value, MorphError)
    assert fault == "never-ready" or "model folder does not exist" in caught.value.log_tail


def test_a_server_that_dies_later_is_noticed(server: EmbeddedServer) -> None:
    with server:
        server.wait_ready(100)
        server.check_alive()
        assert server._process is not None
        server._process.kill()
        server._process.wait()
        with pytest.raises(StartFailed, match="stopped"):
            server.check_alive()


def test_the_demo_compares_both_runs_and_writes_its_report(
    morph: Callable[..., Any], launcher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    result = morph("demo", "--no-show", "--seconds", 3, "--out", out)
    assert result.exit_code == 0, result.stderr
    text = result.stdout
    for part in ("Run 1 of 2", "Run 2 of 2", "w0 w1", "TTFT p95", "most KV blocks", "burst"):
        assert part in text
    assert all(str(out / f"report.{kind}") in text for kind in ("png", "html", "json"))
    figures = json.loads((out / "report.json").read_text())
    off, on = figures["runs"]
    assert (off["mode"], on["mode"]) == ("off", "balanced")
    assert off["summary"]["requests"] == on["summary"]["requests"] > 3 and off["summary"]["errors"] == 0
    assert (off["max_level"], on["max_level"]) == (0, 6) and on["max_kv_blocks"] == 112
    assert " ".join(figures["verdict"].split()) in " ".join(text.split())
    assert (out / "report.png").stat().st_size > 20_000 and "<svg" in (out / "report.html").read_text()


def test_a_server_that_cannot_start_ends_the_demo_with_its_log(
    morph: Callable[..., Any], launcher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORPH_FAKE", "fails")
    result = morph("demo", "--no-show", "--out", tmp_path / "report")
    assert result.exit_code == 1
    assert "model folder does not exist" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_demo_leaves_no_server_behind(
    launcher: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    demo = subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path / "report")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if "quiet:" in line:  # the load has begun
            break
    server = _child_of(demo.pid)
    demo.send_signal(number)
    _, problems = demo.communicate(timeout=100)
    assert demo.returncode == status and "Traceback" not in problems
    deadline = time.monotonic() + 60  # after a SIGKILL nobody waits for the server's orderly end but we
    while alive(server) and (number == signal.SIGKILL and time.monotonic() < deadline):
        time.sleep(0.05)
    assert not alive(server)


def _child_of(parent: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if found:
            return int(found[0])
    raise AssertionError("the demo has no child process")
