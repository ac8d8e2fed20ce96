"""Triton's files, and whether they fit this Python: an installed Triton's (`MORPH_TRITON_DIR`, as in NVIDIA's images),
else those inside the nvidia-pytriton wheel, which is found without importing it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from morph_runtime.errors import ConfigError

PYTHONS = ((3, 10), (3, 11), (3, 12))
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class TritonFiles:
    """Where the parts of the embedded Triton are."""

    server: Path
    """The tritonserver executable."""
    backend: Path
    """Folder of the Python backend."""
    stub: Path
    """The stub of this interpreter's minor version."""
    library_path: str
    """LD_LIBRARY_PATH that server and stub need."""


def check_python(version: tuple[int, int] | None = None, numpy_version: str | None = None) -> None:
    """Check this interpreter and its NumPy; the arguments replace what is found (for tests).

    Raises:
        ConfigError: Triton's stub cannot work with them.
    """
    version = version or sys.version_info[:2]
    if version not in PYTHONS:
        raise ConfigError(
            f"Python {version[0]}.{version[1]} cannot run the embedded Triton: use Python 3.10, 3.11 or 3.12"
            " (its Python stub needs NumPy 1, which has no wheel for 3.13 and later)."
        )
    if numpy_version is None:
        try:
            numpy_version = importlib.metadata.version("numpy")
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError("NumPy is not installed: pip install 'morphserve[server,embedded]'.") from None
    if int(numpy_version.split(".")[0]) >= 2:
        raise ConfigError(
            f"NumPy {numpy_version} crashes the embedded Triton's Python stub at the first request:"
            " pip install 'numpy<2'."
        )


def find_installed(root: Path, version: tuple[int, int] | None = None) -> TritonFiles:
    """Locate the parts of an installed Triton; `version` replaces this interpreter's (for tests).

    Raises:
        ConfigError: a part is missing, or its Python stub is made for another Python than this one.
    """
    version = version or sys.version_info[:2]
    backend = root / "backends" / "python"
    files = TritonFiles(
        server=root / "bin" / "tritonserver",
        backend=backend,
        stub=backend / STUB,
        library_path=f"{root / 'lib'}:{_python_library_folder()}",
    )
    for path in (files.server, files.backend, files.stub):
        if not path.exists():
            raise ConfigError(f"MORPH_TRITON_DIR '{root}' is no Triton with a Python backend: it has no '{path}'.")
    linked = re.search(rb"libpython(3\.\d+)\.so", files.stub.read_bytes())
    wanted = linked[1].decode() if linked else ""
    if wanted and wanted != f"{version[0]}.{version[1]}":
        raise ConfigError(
            f"The Triton in '{root}' runs models in Python {wanted}, but this is Python {version[0]}.{version[1]}:"
            f" install morphserve in Python {wanted}, or take a Triton release for this Python."
        )
    return files


def find_triton() -> TritonFiles:
    """Locate the embedded Triton.

    Raises:
        ConfigError: nvidia-pytriton is not installed, lacks a file, or this Python has no shared library.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("The embedded Triton is not installed: pip install 'morphserve[server,embedded]'.")
    package = Path(next(iter(spec.submodule_search_locations)))
    root = package / "tritonserver"
    minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
    files = TritonFiles(
        server=root / "bin" / "tritonserver",
        backend=root / "backends" / "python",
        stub=root / "python_backend_stubs" / minor / STUB,
        library_path=f"{package.parent / 'nvidia_pytriton.libs'}:{_python_library_folder()}",
    )
    for path in (files.server, files.backend, files.stub):
        if not path.exists():
            raise ConfigError(f"nvidia-pytriton has no '{path}': pip install 'nvidia-pytriton>=0.7,<0.8'.")
    return files


def _python_library_folder() -> str:
    """The folder of libpython3.X.so, which the stub is linked to; empty if the system's loader finds it."""
    name = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"):
        if folder and (Path(folder) / name).exists():
            return str(folder)
    try:
        ctypes.CDLL(name)
    except OSError:
        raise ConfigError(
            f"This Python has no shared library {name}, which Triton's Python stub needs:"
            " install it (for example the package libpython3 of your distribution), or use another Python."
        ) from None
    return ""
