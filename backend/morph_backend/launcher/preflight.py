"""Everything that can be found wrong before Triton is started, each as one sentence."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from morph_backend.launcher.launch_settings import LaunchSettings
from morph_backend.settings import load_model_file
from morph_runtime.config import EngineConfig, log_level, resolve_model_folder
from morph_runtime.errors import ConfigError
from morph_runtime.text.tokenizer import Tokenizer


def check_before_start(settings: LaunchSettings, model: Path) -> EngineConfig:
    """Check the engine's settings, the model folder, its tokenizer and the ports.

    Args:
        settings: the launcher's.
        model: the model's folder in the repository (with `config.pbtxt` and `1/`).

    Raises:
        ConfigError: the first thing that is wrong.
    """
    if not (model / "config.pbtxt").is_file():
        raise ConfigError(f"The model repository '{model.parent}' has no 'morph/config.pbtxt'.")
    log_level(settings.environment)
    config = load_model_file(model / "1" / "model.json", settings.environment).config
    Tokenizer.from_folder(resolve_model_folder(config.model.path))
    for variable, port in settings.ports.items():
        check_port(settings.host, port, variable)
    return config


def check_port(host: str, port: int, variable: str) -> None:
    """Check that a server could listen there.

    Raises:
        ConfigError: the port is taken or may not be used, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except socket.gaierror:
        raise ConfigError(f"MORPH_HOST '{host}' is not an address that this machine knows.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"Port {port} is in use: set {variable} to a free one.") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"MORPH_HOST '{host}' is not an address of this machine.") from None
        raise ConfigError(f"Port {port} cannot be used ({error.strerror}): set {variable} to another one.") from None
