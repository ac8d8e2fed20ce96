"""One run of tritonserver: start, wait until it is ready, watch, and end it without leaving anything behind."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from morph_backend.auto_config import names_tensors
from morph_backend.control import RUN_DIR_VARIABLE, ControlFolder, closed_word
from morph_backend.launcher.launch_settings import LaunchSettings
from morph_backend.launcher.processes import ProcessWatch, end_processes
from morph_backend.launcher.run_folder import RunFolder
from morph_backend.launcher.server_log import LogFilter
from morph_backend.launcher.triton_files import TritonFiles
from morph_runtime.config import EngineConfig, with_variables
from morph_runtime.errors import ConfigError

TICK_S = 0.1
EXIT_TIMEOUT_S = 5
"""Seconds that tritonserver gives requests at its end; the drain before it has ended them all."""
KILL_AFTER_S = EXIT_TIMEOUT_S + 10.0
PINNED_AFTER_S = 1.0
"""Seconds from Triton's word that it exits at once to its kill: an idle gRPC stream keeps the process alive."""
LAST_WORDS_S = 2.0
"""Seconds from the engine's end to the server's: the errors of the open streams are on their way to the clients."""
PR_SET_PDEATHSIG = 1
ADMIN_ENDPOINTS = "shared-memory,model-repository,trace,logging"
"""Endpoints that change the server or let clients name memory of this machine: served with the admin key alone."""


class Supervisor:
    """Runs tritonserver in the foreground; use once."""

    def __init__(
        self, settings: LaunchSettings, files: TritonFiles, run: RunFolder, repository: Path, config: EngineConfig
    ) -> None:
        self._settings = settings
        self._files = files
        self._run = run
        self._repository = repository
        self._config = config
        self._control = ControlFolder(run.path)
        self._filter = LogFilter(_complain, settings.verbose)
        self._signals = 0
        self._models: dict[int, ProcessWatch] = {}
        self._gives_up = threading.Event()

    def run(self) -> int:
        """Start and stay until the end; returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        environment = self._environment()
        command = self._command()
        self._say(f"loading {self._config.model.path} …")
        server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
        self._printer = threading.Thread(target=self._print_log, args=(server,), name="triton-log", daemon=True)
        self._printer.start()
        try:
            return self._watch(server)
        finally:
            self._end(server)
            for watch in self._models.values():
                watch.close()
            end_processes(self._run.path)
            self._printer.join(2.0)

    def _watch(self, server: subprocess.Popen[bytes]) -> int:
        ready = False
        while not self._signals:
            if _wait(server, TICK_S):
                return self._explain_death(server.returncode, ready)
            if (reason := self._engine_gone()) is not None:
                return self._explain_engine(server, reason)
            if self._model_gone():
                return self._explain_model()
            if not ready and self._is_ready():
                ready = True
                self._filter.started()
                host = self._settings.probe_host
                self._say(
                    f"ready: http://{host}:{self._settings.http_port}  grpc {host}:{self._settings.grpc_port}"
                    f"  metrics http://{host}:{self._settings.metrics_port}/metrics"
                )
        self._filter.ending()
        self._say("draining: open streams may end, new requests are refused …")
        self._drain(server)
        return 0

    def _drain(self, server: subprocess.Popen[bytes]) -> None:
        """Let the model end its streams; a second signal cuts it short."""
        if self._control.heard("ready") is None:
            return  # still loading: nothing to drain
        self._control.ask_drain(self._settings.drain_s)
        deadline = time.monotonic() + self._settings.drain_s + 2.0
        while self._control.heard("drained") is None and time.monotonic() < deadline and self._signals < 2:
            if _wait(server, TICK_S):
                return

    def _end(self, server: subprocess.Popen[bytes]) -> None:
        if server.poll() is not None:
            return
        server.terminate()
        deadline = time.monotonic() + KILL_AFTER_S
        while time.monotonic() < deadline and self._signals < 3:
            if _wait(server, TICK_S):
                return
            if self._gives_up.is_set():
                _wait(server, PINNED_AFTER_S)
                break
        server.kill()
        server.wait()

    def _engine_gone(self) -> str | None:
        """Why the model can serve no more; an error before `ready` is another matter: then Triton ends by itself."""
        return self._control.heard("error") if self._control.heard("ready") is not None else None

    def _explain_engine(self, server: subprocess.Popen[bytes], reason: str) -> int:
        """A server that refuses everything is of no use: let it deliver the errors, then end it, so that it is seen."""
        _wait(server, LAST_WORDS_S)
        self._filter.started()
        self._filter.ending()
        _complain(f"The server ends because it can serve nothing any more: {reason}")
        return 1

    def _model_gone(self) -> bool:
        """Whether the process that runs the model has ended. Triton 2.51 does not tell: it stays healthy, new requests
        are refused, and open streams hang for ever."""
        if (told := self._control.heard("ready")) is not None and (pid := json.loads(told)["pid"]) not in self._models:
            self._models[pid] = ProcessWatch(pid)
        return any(
            watch.has_ended and self._control.heard(closed_word(pid)) is None for pid, watch in self._models.items()
        )

    def _explain_model(self) -> int:
        self._filter.started()
        self._filter.ending()
        _complain("The server ends because the process that runs its model has died.")
        return 1

    def _explain_death(self, status: int, ready: bool) -> int:
        self._printer.join(2.0)
        sentence = self._control.heard("error")
        self._filter.started(forget=bool(sentence))
        if sentence:
            _complain(with_variables(sentence))
        else:
            state = "has died" if ready else "could not start"
            hint = "" if self._settings.verbose else " Set MORPH_LOG_VERBOSE=1 to see its whole log."
            _complain(f"Triton {state} (exit status {status}).{hint}")
        return 1

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(self._settings.probe_host, self._settings.http_port, timeout=1.0)
        try:
            connection.request("GET", "/v2/models/morph/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _command(self) -> list[str]:
        settings = self._settings
        command = [
            str(self._run.server(self._files)),
            f"--model-repository={self._repository}",
            f"--backend-directory={self._run.backends(self._files)}",
            f"--backend-config=python,shm-region-prefix-name={self._run.shm_prefix}",
            f"--http-address={settings.host}",
            f"--http-port={settings.http_port}",
            f"--grpc-address={settings.host}",
            f"--grpc-port={settings.grpc_port}",
            f"--metrics-address={settings.host}",
            f"--metrics-port={settings.metrics_port}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            f"--log-verbose={1 if settings.verbose else 0}",
        ]
        if names_tensors(self._repository / "morph" / "config.pbtxt"):
            command.append("--disable-auto-complete-config")  # nothing to complete: it saves the start of a stub
        given = " ".join(settings.triton_arguments)
        command += [
            f"{option}={ADMIN_ENDPOINTS}:admin-key={settings.admin_key}"
            for option in ("--http-restricted-api", "--grpc-restricted-protocol")
            if option not in given
        ]
        gpu = [] if _has_gpu() else ["--allow-gpu-metrics=false"]
        return [*command, *gpu, *settings.triton_arguments]

    def _environment(self) -> Mapping[str, str]:
        settings = self._settings
        folder = Path(sys.executable).parent  # not resolved: a virtual environment is known by where the link stands
        if not (folder / "python3").exists():
            raise ConfigError(
                f"'{folder}' has no 'python3': start the launcher with the Python of a virtual environment."
            )
        libraries = [self._files.library_path, settings.environment.get("LD_LIBRARY_PATH", "")]
        return {
            "TOKENIZERS_PARALLELISM": "false",
            **settings.environment,
            **{name: str(port) for name, port in settings.ports.items()},
            RUN_DIR_VARIABLE: str(self._run.path),
            "MORPH_METRICS_HOST": settings.probe_host,
            "MORPH_GRPC_HOST": settings.probe_host,
            "LD_LIBRARY_PATH": ":".join(part for part in libraries if part),
            "PATH": f"{folder}:{settings.environment.get('PATH', os.defpath)}",
        }

    def _print_log(self, server: subprocess.Popen[bytes]) -> None:
        assert server.stdout is not None
        for raw in server.stdout:
            line = raw.decode("utf-8", "replace")
            if "Exiting immediately" in line:
                self._gives_up.set()
            self._filter.feed(line)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    @staticmethod
    def _say(text: str) -> None:
        print(text, flush=True)


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _wait(server: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the server has ended within `seconds`."""
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def _die_with_parent() -> Callable[[], None]:
    """For the child between fork and exec: end it when this process dies without having ended it."""
    libc = ctypes.CDLL(None)

    def set_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return set_signal
