"""What the kernels need of the machine to be compiled, looked at before a model is loaded."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from triton import knobs

from morph_runtime.errors import ConfigError


def check_toolchain() -> None:
    """Make sure that Triton-lang can compile: it keeps what it makes in a folder, and builds its launcher in C.

    Raises:
        ConfigError: the folder cannot be written to; or there is no C compiler, or no Python.h, and the folder is
            empty.
    """
    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(_unwritable(folder, error.strerror)) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(_unwritable(folder, "no permission"))
    if any(folder.iterdir()):
        return
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise ConfigError(
            "device is cuda, but there is no C compiler, which the kernels' first start needs: install gcc, or set CC."
        )
    header = Path(sysconfig.get_paths(scheme="posix_prefix")["include"]) / "Python.h"
    if not header.is_file():
        raise ConfigError(
            f"device is cuda, but '{header}' is missing, which the kernels' first start needs: install python3-dev."
        )


def _unwritable(folder: Path, why: str | None) -> str:
    return (
        f"device is cuda, but the folder for compiled kernels, '{folder}', cannot be written to ({why}): set "
        "TRITON_CACHE_DIR to one that can."
    )
