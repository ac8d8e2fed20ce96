"""Starts the embedded server as a child process, waits until it is ready, and always ends it."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import importlib.machinery
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from morph_client.errors import MissingDependency, MorphError
from morph_client.ports import free_ports

LAUNCHER = "morph_backend.launcher"

_POLL_S = 0.25
_PR_SET_PDEATHSIG = 1


class StartFailed(MorphError):
    """The server did not come up; ``log_tail`` holds its last lines."""

    def __init__(self, message: str, log_tail: str) -> None:
        super().__init__(message)
        self.log_tail = log_tail


@dataclass(frozen=True)
class Ports:
    """The three ports of one Triton."""

    http: int
    grpc: int
    metrics: int


def require_launcher() -> None:
    """Raises :class:`MissingDependency` unless the server part is installed."""
    # Found without importing: the usual way to look for a submodule would run its package's code here.
    package = importlib.util.find_spec(LAUNCHER.partition(".")[0])
    places = package.submodule_search_locations if package is not None else None
    if places is None or importlib.machinery.PathFinder.find_spec(LAUNCHER, places) is None:
        raise MissingDependency("the server part is not installed: pip install 'morphserve[server,embedded]'")


class EmbeddedServer:
    """One run of the launcher, in a process group of its own. Use it as a context manager."""

    def __init__(self, mode: str, log_path: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.mode = mode
        self.ports = Ports(*free_ports(3))
        self.log_path = log_path
        self._environment = {
            **(os.environ if environment is None else environment),
            "MORPH_MODE": mode,
            "MORPH_HTTP_PORT": str(self.ports.http),
            "MORPH_GRPC_PORT": str(self.ports.grpc),
            "MORPH_METRICS_PORT": str(self.ports.metrics),
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def grpc_url(self) -> str:
        """host:port for a client."""
        return f"localhost:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        """The metrics page."""
        return f"http://localhost:{self.ports.metrics}/metrics"

    def start(self) -> None:
        """Starts the process; its output goes to ``log_path``. Raises :class:`MissingDependency`."""
        require_launcher()
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", LAUNCHER],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C in the terminal must reach this program only, which then ends the server in order.
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )

    def wait_ready(self, deadline_s: float, on_poll: Callable[[float], None] | None = None) -> float:
        """Waits until the model takes requests; returns the seconds it took.

        ``on_poll`` gets the seconds waited so far. Raises :class:`StartFailed` if the process ends, or is not ready
        within ``deadline_s`` seconds.
        """
        assert self._process is not None
        start = time.monotonic()
        while True:
            waited = time.monotonic() - start
            if self._answers():
                return waited
            if waited > deadline_s:
                raise StartFailed(f"the server was not ready within {deadline_s:.0f} s", self.log_tail())
            if on_poll is not None:
                on_poll(waited)
            try:
                code = self._process.wait(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                continue
            raise StartFailed(f"the server stopped while it was starting (exit code {code})", self.log_tail())

    def check_alive(self) -> None:
        """Raises :class:`StartFailed` if the process has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise StartFailed(f"the server stopped (exit code {self._process.returncode})", self.log_tail())

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the server's output."""
        with self.log_path.open(encoding="utf-8", errors="replace") as log:
            return "".join(deque(log, lines)).rstrip()

    def stop(self, grace_s: float = 30.0) -> None:
        """SIGTERM, up to ``grace_s`` seconds to finish, then SIGKILL for what is left of the process group."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()
            process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
        finally:
            # Also after an orderly end: Triton's stubs are known to outlive a server that was killed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("localhost", self.ports.http, timeout=2.0)
        try:
            connection.request("GET", "/v2/models/morph/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _die_with_parent() -> Callable[[], None]:
    """For the child between fork and exec: SIGTERM when this process ends without having ended it (kill -9)."""
    libc = ctypes.CDLL(None)

    def ask_the_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask_the_kernel
