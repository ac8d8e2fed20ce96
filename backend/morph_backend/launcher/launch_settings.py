"""What the launcher is told: ports, addresses, folders, times; from the command line, then `MORPH_*`."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from morph_backend.place import MOST
from morph_runtime.config import ENVIRONMENT
from morph_runtime.errors import ConfigError


@dataclass(frozen=True)
class LaunchSettings:
    """Validated settings of one run."""

    host: str
    """Address that all three endpoints bind to."""
    http_port: int
    grpc_port: int
    metrics_port: int
    repository: Path | None
    """Model repository; None: the checkout's, else the packaged one."""
    instances: int | None
    """Serving processes of the model, if that is asked for."""
    verbose: bool
    """Whether all of Triton's log is printed."""
    triton: Path | None
    """Folder of an installed Triton to use; None: the embedded one."""
    triton_arguments: Sequence[str]
    """Further arguments for tritonserver, after ours."""
    check: bool
    """Whether to end after the checks, without starting anything."""
    drain_s: float
    """Seconds that open streams get to end after SIGTERM or Ctrl-C."""
    admin_key: str
    """What a client must send as `admin-key` to use Triton's endpoints for administrators."""
    environment: Mapping[str, str]
    """The environment with the command line's `MORPH_*` on top."""

    @property
    def ports(self) -> Mapping[str, int]:
        """Ports by the name of their variable."""
        return {
            "MORPH_HTTP_PORT": self.http_port,
            "MORPH_GRPC_PORT": self.grpc_port,
            "MORPH_METRICS_PORT": self.metrics_port,
        }

    @property
    def probe_host(self) -> str:
        """The address by which this machine reaches the endpoints."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)


_OPTIONS: tuple[tuple[str, str, str], ...] = (
    ("--model", "MORPH_MODEL", "folder of a Hugging Face checkpoint"),
    ("--mode", "MORPH_MODE", "accuracy, balanced, performance or off"),
    ("--memory-budget-gib", "MORPH_MEMORY_BUDGET_GIB", "GiB for weights, KV cache and staging"),
    ("--host", "MORPH_HOST", "address to bind to (127.0.0.1)"),
    ("--http-port", "MORPH_HTTP_PORT", "HTTP port (8000)"),
    ("--grpc-port", "MORPH_GRPC_PORT", "gRPC port (8001)"),
    ("--metrics-port", "MORPH_METRICS_PORT", "metrics port (8002)"),
    ("--model-repository", "MORPH_MODEL_REPOSITORY", "model repository with a folder 'morph'"),
    (
        "--instances",
        "MORPH_INSTANCES",
        "processes that read, detokenize and send (1; on a GPU one for every five processors)",
    ),
    ("--triton-dir", "MORPH_TRITON_DIR", "an installed Triton, such as /opt/tritonserver (the embedded one)"),
    ("--triton-args", "MORPH_TRITON_ARGS", "further arguments for tritonserver, as one text"),
    ("--drain-seconds", "MORPH_DRAIN_S", "seconds for open streams to end at shutdown (30)"),
)


# Names of other programs of this repository that may stand in the same environment.
_OTHERS = (
    "MORPH_AWQ_ENV", "MORPH_BIND", "MORPH_CHAT_TEMPLATE", "MORPH_EXTRAS", "MORPH_GRPC_HOST", "MORPH_IMAGE_TAG",
    "MORPH_METRICS_HOST", "MORPH_METRICS_URL", "MORPH_OPENAI_HOST", "MORPH_OPENAI_PORT", "MORPH_OPENAI_WORKERS",
    "MORPH_RUN_DIR", "MORPH_SERVED_MODEL_NAME", "MORPH_URL",
)  # fmt: skip
_SETTINGS = (
    *ENVIRONMENT, *(name for _, name, _ in _OPTIONS), "MORPH_ADMIN_KEY", "MORPH_LOG_LEVEL", "MORPH_LOG_VERBOSE"
)  # fmt: skip


def check_names(env: Mapping[str, str]) -> None:
    """Refuse a variable that is nearly one of ours: a slip would leave the setting at its default without a word.

    Raises:
        ConfigError: there is one; the text names what is meant.
    """
    strange = [name for name in env if name.startswith("MORPH_") and name not in _SETTINGS and name not in _OTHERS]
    for name in sorted(strange):
        if meant := difflib.get_close_matches(name, _SETTINGS, 1, 0.85):
            raise ConfigError(f"{name} is no setting: {meant[0]} is meant, or unset it.")


def launch_settings(arguments: Sequence[str], env: Mapping[str, str]) -> LaunchSettings:
    """Read the command line and the environment; the command line wins.

    Raises:
        ConfigError: a value is not valid; the text names its variable.
        SystemExit: --help, or an unknown option (status 2).
    """
    parser = argparse.ArgumentParser(
        prog="morphserve-triton",
        description="Run Triton with the MorphServe model. Each option is also an environment variable.",
    )
    for option, variable, meaning in _OPTIONS:
        parser.add_argument(option, dest=variable, metavar="X", help=f"{meaning}; {variable}")
    parser.add_argument("--verbose", action="store_true", help="print all of Triton's log; MORPH_LOG_VERBOSE=1")
    parser.add_argument("--check", action="store_true", help="check settings and model, then end")
    given = vars(parser.parse_args(arguments))
    verbose, check = given.pop("verbose"), given.pop("check")
    values = {**env, **{name: value for name, value in given.items() if value is not None}}
    check_names(env)
    repository, triton = values.get("MORPH_MODEL_REPOSITORY", ""), values.get("MORPH_TRITON_DIR", "")
    settings = LaunchSettings(
        host=values.get("MORPH_HOST") or "127.0.0.1",
        http_port=_port(values, "MORPH_HTTP_PORT", 8000),
        grpc_port=_port(values, "MORPH_GRPC_PORT", 8001),
        metrics_port=_port(values, "MORPH_METRICS_PORT", 8002),
        repository=Path(repository).resolve() if repository else None,
        instances=_instances(values, "MORPH_INSTANCES"),
        verbose=verbose or values.get("MORPH_LOG_VERBOSE", "") not in ("", "0"),
        triton=Path(triton).resolve() if triton else None,
        triton_arguments=_words(values, "MORPH_TRITON_ARGS"),
        check=check,
        drain_s=_seconds(values, "MORPH_DRAIN_S", 30.0),
        admin_key=_key(values, "MORPH_ADMIN_KEY"),
        environment=values,
    )
    if len(set(settings.ports.values())) < 3:
        raise ConfigError("MORPH_HTTP_PORT, MORPH_GRPC_PORT and MORPH_METRICS_PORT must be three different ports.")
    return settings


def _key(values: Mapping[str, str], name: str) -> str:
    key = values.get(name, "")
    if key and not re.fullmatch(r"[A-Za-z0-9_-]{16,128}", key):
        raise ConfigError(f"{name} must be 16 to 128 letters, digits, '-' or '_'.")
    return key or secrets.token_urlsafe(24)


def default_instances() -> int:
    """One for every five processors, at most eight; see bench/serving."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 5))


def _instances(values: Mapping[str, str], name: str) -> int | None:
    if not (text := values.get(name, "")):
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= MOST):
        raise ConfigError(f"{name} must be a number between 1 and {MOST}, but is '{text}'.")
    return int(text)


def _words(values: Mapping[str, str], name: str) -> Sequence[str]:
    try:
        return shlex.split(values.get(name, ""))
    except ValueError as error:
        raise ConfigError(f"{name} cannot be split into arguments: {error}.") from None


def _port(values: Mapping[str, str], name: str, default: int) -> int:
    text = values.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ConfigError(f"{name} must be a port between 1 and 65535, but is '{text}'.")
    return int(text)


def _seconds(values: Mapping[str, str], name: str, default: float) -> float:
    text = values.get(name) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise ConfigError(f"{name} must be between 0 and 3600 seconds, but is '{text}'.")
    return seconds
