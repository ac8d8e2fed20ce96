"""The serving process's handle on the engine process: start it, talk to it, learn of its end."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Protocol

import msgspec

from morph_runtime.config import EngineConfig
from morph_runtime.engine.environment import engine_variables
from morph_runtime.engine.messages import (
    Cancel,
    Drain,
    EngineFailure,
    EngineInfo,
    EngineStats,
    FromEngine,
    QueueSignal,
    SetMode,
    Start,
    StepOutput,
    Submit,
)
from morph_runtime.engine.wire import FrameReader, FrameWriter
from morph_runtime.errors import ConfigError, EngineDown

KILL_AFTER_S = 5.0
SIGNALS_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit statuses of an engine that somebody has ended; no defect of its own ends it so."""


class EngineListener(Protocol):
    """Who wants to hear from the engine. All calls come from the client's one reader thread and must be quick."""

    def on_step(self, out: StepOutput) -> None:
        """A step has produced tokens, started or ended requests."""

    def on_stats(self, stats: EngineStats) -> None:
        """A snapshot, a few times a second."""

    def on_down(self, reason: str) -> None:
        """The engine has ended without being asked to: it will say no more. Called once."""


class EngineClient:
    """Starts the engine in a process of its own and exchanges messages with it.

    The engine sees the end of this process as the end of its socket and exits, so it never outlives us.
    """

    def __init__(
        self, config: EngineConfig, listener: EngineListener, *, python: str | None = None, server: int = 0
    ) -> None:
        """`server`: the parent of this process, if this process is to end with it (`engine.orphan`); 0: it is not."""
        self._config = config
        self._server = server
        self._listener = listener
        self._python = python or _python_of_this_environment()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._writer: FrameWriter | None = None
        self._reader_thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._failed = False  # the engine has said that it cannot go on
        self._insisted = False  # we have killed it

    @property
    def pid(self) -> int:
        """Process id of the engine; 0 before `start`."""
        return self._process.pid if self._process else 0

    @property
    def ended_from_outside(self) -> bool:
        """Whether somebody else has ended the engine process, by signal; known after `close`."""
        status = self._process.returncode if self._process else None
        return status in SIGNALS_FROM_OUTSIDE and not self._failed and not self._insisted

    def start(self, timeout_s: float = 120.0) -> EngineInfo:
        """Spawn the engine and wait until it is ready.

        Raises:
            ConfigError: the engine refused its configuration or model (one sentence for the user).
            EngineDown: it could not be spawned, died, or was not ready within `timeout_s` seconds.
        """
        if self._closing.is_set():
            raise EngineDown("The engine is closed.")
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sock = ours
            with theirs:
                guard = ["--server", str(self._server)] if self._server else []
                self._process = subprocess.Popen(
                    [self._python, "-m", "morph_runtime.engine.process", "--fd", str(theirs.fileno()), *guard],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **engine_variables(self._config)},
                )
        except OSError as error:  # short of memory, processes or descriptors: perhaps not for long
            self._kill()
            raise EngineDown(f"The engine process could not be started: {error}.") from None
        if self._closing.is_set():  # since we looked: whoever closed found no process to end
            self._kill()
            raise EngineDown("The engine is closed.")
        self._writer = FrameWriter(ours)
        reader: FrameReader[FromEngine] = FrameReader(ours, msgspec.msgpack.Decoder(FromEngine))
        try:
            self._writer.send(Start(config=self._config.to_json()))
            ours.settimeout(timeout_s)
            first = reader.receive()
            ours.settimeout(None)
        except TimeoutError:
            self._kill()
            raise EngineDown(f"The engine was not ready within {timeout_s:g} s.") from None
        except (EngineDown, OSError):  # it has ended, or `close` has taken the socket away meanwhile
            first = None
        if isinstance(first, EngineInfo):
            self._reader_thread = threading.Thread(target=self._read, args=(reader,), name="engine-reader", daemon=True)
            self._reader_thread.start()
            return first
        self._kill()
        if isinstance(first, EngineFailure):
            raise (ConfigError if first.user_error else EngineDown)(first.message)
        raise EngineDown(f"The engine process ended while starting (exit status {self._process.returncode}).")

    def submit(self, request: Submit) -> None:
        """Hand a request to the engine. Raises EngineDown."""
        self._send(request)

    def cancel(self, key: int) -> None:
        """Ask the engine to end a request; it answers with `Finished(reason="cancelled")`. Raises EngineDown."""
        self._send(Cancel(key=key))

    def publish_queue(self, signal: QueueSignal) -> None:
        """Tell the controller what the outer queue shows. Raises EngineDown."""
        self._send(signal)

    def set_mode(self, mode: str = "", cap: float | None = None) -> None:
        """Change the controller's mode, its cap, or both. Raises EngineDown."""
        self._send(SetMode(mode=mode, cap=cap))

    def kill(self) -> None:
        """End an engine that does not answer, at once; `on_down` follows."""
        self._insisted = True
        if self._process is not None:
            self._process.kill()

    def close(self, drain_s: float = 0.0) -> None:
        """End the engine: let it finish for `drain_s` seconds, then close its socket, then kill it."""
        self._closing.set()
        if self._process is None:
            return
        if drain_s > 0 and self._process.poll() is None:
            with contextlib.suppress(EngineDown):
                self._send(Drain())
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(drain_s)
        self._kill()
        if self._reader_thread is not None and self._reader_thread is not threading.current_thread():
            self._reader_thread.join(KILL_AFTER_S)

    def _send(self, message: msgspec.Struct) -> None:
        if self._writer is None:
            raise EngineDown("The engine has not been started.")
        self._writer.send(message)

    def _read(self, reader: FrameReader[FromEngine]) -> None:
        reason = "The engine process ended unexpectedly."
        try:
            while (message := reader.receive()) is not None:
                if isinstance(message, StepOutput):
                    self._listener.on_step(message)
                elif isinstance(message, EngineStats):
                    self._listener.on_stats(message)
                elif isinstance(message, EngineFailure):
                    reason, self._failed = message.message, True
                    break  # its last word; the process may take long to exit
        except EngineDown as error:
            reason, self._failed = str(error), True
        except Exception as error:  # a listener's defect must reach on_down, or every stream would hang
            logging.getLogger(__name__).exception("engine reader failed")
            reason = f"The engine's messages could not be handled ({error})."
        if not self._closing.is_set():
            self._listener.on_down(reason)

    def _kill(self) -> None:
        """Close the socket (the engine exits on that), then insist."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._sock.close()
        if self._process is not None:
            try:
                self._process.wait(KILL_AFTER_S)
            except subprocess.TimeoutExpired:
                self.kill()
                try:
                    self._process.wait(KILL_AFTER_S)
                except subprocess.TimeoutExpired:  # in the kernel, as when a GPU has fallen off its bus
                    logging.getLogger(__name__).error("the engine process %d cannot be killed", self._process.pid)


def _python_of_this_environment() -> str:
    """The interpreter whose packages this process uses; in an embedding program `sys.executable` is not it."""
    candidate = Path(sys.prefix) / "bin" / "python3"
    if candidate.exists():
        return str(candidate)
    return shutil.which("python3") or sys.executable
