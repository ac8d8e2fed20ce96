"""The private folder of one run: Triton's Python backend with the right stub, and the model repository."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.resources
import json
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from morph_backend.launcher.launch_settings import LaunchSettings, default_instances
from morph_backend.launcher.processes import processes_of
from morph_backend.launcher.triton_files import STUB, TritonFiles
from morph_backend.settings import checkout_root
from morph_runtime.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "morphserve-"
OWNER_LOCK = "owner.lock"
"""Locked by the launcher as long as it lives."""
MODEL_PY = '''"""MorphServe on Triton. The model itself is `morph_backend.model`."""

from morph_backend.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


class RunFolder:
    """Made at start, removed at the end together with the run's shared memory.

    Attributes:
        path: the folder; `MORPH_RUN_DIR` of the server, by which its processes are known.
        shm_prefix: how the names of this run's shared memory begin.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.shm_prefix = f"{self.path.name}_"
        # Locked before it has its name: nobody ever sees the lock of a living owner open.
        unnamed = self.path / "owner"
        self._owner = unnamed.open("w")
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        unnamed.rename(self.path / OWNER_LOCK)

    def backends(self, files: TritonFiles) -> Path:
        """A backend folder with the Python backend and the stub of this interpreter."""
        folder = self.path / "backends" / "python"
        folder.mkdir(parents=True)
        for source in files.backend.iterdir():
            if source.is_file() and source.name != STUB:
                _link_or_copy(source, folder / source.name)
        stub = folder / STUB
        shutil.copyfile(files.stub, stub)
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
        return folder.parent

    def server(self, files: TritonFiles) -> Path:
        """The tritonserver executable: the wheel's, or a copy if that may not be executed."""
        if os.access(files.server, os.X_OK):
            return files.server
        copy = self.path / "tritonserver"
        shutil.copyfile(files.server, copy)
        copy.chmod(0o700)
        return copy

    def repository(self, settings: LaunchSettings) -> Path:
        """The model repository: the one asked for, the checkout's, or the packaged one written out; with as many
        instances of the model as are asked for. If nobody has said how many, and the repository is ours and says 1,
        there are as many as the processors allow, on a GPU: a CPU's engine wants the processors itself.

        Raises:
            ConfigError: a number is asked for, and its `config.pbtxt` does not say in our way how many there are.
        """
        given, wanted = self._repository(settings), settings.instances
        config = given / "morph" / "config.pbtxt"
        text = config.read_text(encoding="utf-8") if config.is_file() else ""
        said = re.search(r"^instance_group \[ \{ count: (\d+)\b", text, re.MULTILINE)
        if wanted is None:
            untouched = settings.repository is None and said is not None and said[1] == "1"
            wanted = default_instances() if untouched and _is_for_gpu(settings, given / "morph") else None
        elif said is None and text:
            raise ConfigError(f"MORPH_INSTANCES: '{config}' has no line `instance_group [ {{ count: 1 ... }} ]`.")
        if wanted is None or said is None or int(said[1]) == wanted:
            return given
        changed = f"{text[: said.start(1)]}{wanted}{text[said.end(1) :]}"
        folder = self.path / "repository"
        (folder / "morph").mkdir(parents=True)
        for source in (*given.iterdir(), *(given / "morph").iterdir()):
            if source not in (config, given / "morph"):
                (folder / source.relative_to(given)).symlink_to(source)
        (folder / "morph" / "config.pbtxt").write_text(changed, encoding="utf-8")
        return folder

    def _repository(self, settings: LaunchSettings) -> Path:
        if settings.repository is not None:
            return settings.repository
        root = checkout_root()
        if root is not None:
            return root / "model_repository"
        folder = self.path / "model_repository"
        version = folder / "morph" / "1"
        version.mkdir(parents=True)
        packaged = importlib.resources.files("morph_backend") / "repository"
        (folder / "morph" / "config.pbtxt").write_text((packaged / "config.pbtxt").read_text(encoding="utf-8"))
        (version / "model.json").write_text((packaged / "model.json").read_text(encoding="utf-8"))
        (version / "model.py").write_text(MODEL_PY, encoding="utf-8")
        return folder

    def remove(self) -> None:
        """Remove the folder and this run's shared memory."""
        _remove(self.path)
        self._owner.close()


def _is_for_gpu(settings: LaunchSettings, model: Path) -> bool:
    """Whether the environment, or else the model's own settings, name a GPU."""
    device = settings.environment.get("MORPH_DEVICE")
    if not device:
        try:
            device = json.loads((model / "1" / "model.json").read_text(encoding="utf-8")).get("device")
        except (OSError, ValueError, AttributeError):
            return False  # the check that follows says what is wrong with it
    return device == "cuda"


def sweep_stale() -> list[Path]:
    """Remove what launchers that were killed have left: folders without an owner and without a process.

    The system drops the lock of an owner that dies, however it dies.

    Returns:
        the folders.
    """
    swept = []
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{OWNER_LOCK}"):
        with contextlib.suppress(OSError), lock.open() as owner:  # another user's, locked, or gone meanwhile
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not processes_of(lock.parent):
                _remove(lock.parent)
                swept.append(lock.parent)
    return swept


def _remove(folder: Path) -> None:
    for region in SHARED_MEMORY.glob(f"{folder.name}_*"):
        with contextlib.suppress(OSError):
            region.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
