"""The Python environment that AutoAWQ runs in: made once, with the versions that were tested together."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

from morph_client.errors import BadInput, MorphError

PINNED = ("torch==2.13.0", "transformers==4.51.3", "numpy>=1.26,<2", "accelerate>=1.5,<2", "zstandard", "setuptools")
"""AutoAWQ's last version was tested with transformers 4.51.3; from 4.57 on it does not import."""
ALONE = ("autoawq==0.2.9",)
"""Without what it depends on: `triton` and `datasets` are for GPUs and downloads, which are not used."""
STAMP = "morph-awq.json"
"""Marks the folder as ours; holds a digest of the versions once the environment is complete."""


def default_folder(env: Mapping[str, str] | None = None) -> Path:
    """Where the environment is kept between runs: MORPH_AWQ_ENV, or a folder in the user's cache."""
    env = os.environ if env is None else env
    if env.get("MORPH_AWQ_ENV"):
        return Path(env["MORPH_AWQ_ENV"])
    cache = env.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "morphserve" / "awq-env"


def digest() -> str:
    """Changes when the versions do, so that an environment with other ones is not taken for this one."""
    return hashlib.sha256(json.dumps([PINNED, ALONE]).encode()).hexdigest()[:16]


def is_ready(folder: Path) -> bool:
    """Whether the environment is there and complete."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stamp, dict) and stamp.get("digest") == digest() and python_of(folder).is_file()


def python_of(folder: Path) -> Path:
    """Its interpreter."""
    return folder / "bin" / "python"


def ensure(folder: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of a complete environment in `folder`, which is made if it is not there.

    pip installs it as it is configured for the user (index, wheels); its words go to `pip.log` in the folder.

    Args:
        folder: of the environment.
        say: gets a sentence before something that takes minutes.

    Raises:
        BadInput: the folder holds something else; it is left alone.
        MorphError: an installation failed; the text names the log.
    """
    if is_ready(folder):
        return python_of(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / STAMP).is_file():
        raise BadInput(f"'{folder}' is not empty and was not made by this command: give another --env.")
    say(f"making an environment for AutoAWQ in {folder} (once; it takes PyTorch and some minutes)")
    log = folder / "pip.log"
    try:
        venv.create(folder, with_pip=True, clear=folder.exists())
        (folder / STAMP).write_text("{}", encoding="utf-8")
        with log.open("wb") as words:
            for packages in (PINNED, ("--no-deps", *ALONE)):
                command = [str(python_of(folder)), "-m", "pip", "install", "--no-input", *packages]
                subprocess.run(command, check=True, stdout=words, stderr=subprocess.STDOUT, env=_clean())
        (folder / STAMP).write_text(json.dumps({"digest": digest()}), encoding="utf-8")
    except subprocess.CalledProcessError as error:
        where = log if log.is_file() else folder
        raise MorphError(f"the environment for AutoAWQ could not be made; see {where}: {error}") from None
    except OSError as error:
        raise MorphError(f"the environment for AutoAWQ could not be made in {folder}: {error}") from None
    return python_of(folder)


def run_worker(python: Path, arguments: list[str]) -> int:
    """Run the worker script; its words go to this process's standard output and error. Returns its exit status."""
    worker = Path(__file__).with_name("worker.py")
    return subprocess.run([str(python), "-I", str(worker), *arguments], env=_clean()).returncode


def check_interpreter() -> None:
    """AutoAWQ's PyTorch has wheels for the Pythons that this package runs on, and for no later ones.

    Raises:
        BadInput: this is another Python.
    """
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise BadInput(f"morph quantize needs Python 3.10, 3.11 or 3.12, but this is {sys.version.split()[0]}.")


def _clean() -> dict[str, str]:
    """This process's environment without what would leak packages of another one."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
