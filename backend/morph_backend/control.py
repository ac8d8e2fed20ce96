"""Files through which the launcher and the model talk: `drain` in, `drained`, `ready`, `closed` and `error` out.

The folder is named by `MORPH_RUN_DIR`, which the launcher sets; without it (Triton started by
other means) nothing is read or written.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

RUN_DIR_VARIABLE = "MORPH_RUN_DIR"


def closed_word(pid: int) -> str:
    """What a model's process leaves when it ends as it should, such as after an unload."""
    return f"closed.{pid}"


class ControlFolder:
    """Both sides use it: the launcher asks, the model answers."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @staticmethod
    def from_environment(env: Mapping[str, str]) -> ControlFolder:
        """The folder that `MORPH_RUN_DIR` names, or none."""
        text = env.get(RUN_DIR_VARIABLE, "")
        return ControlFolder(Path(text) if text else None)

    def ask_drain(self, seconds: float) -> None:
        """Launcher: take no more requests, and finish those that run within `seconds`."""
        self._write("drain", f"{seconds:g}")

    def drain_asked(self) -> float | None:
        """Model: the seconds that were given, or None while nobody asked."""
        text = self._read("drain")
        try:
            seconds = float(text) if text else None
        except ValueError:
            seconds = 0.0
        return seconds if seconds is None or math.isfinite(seconds) else 0.0

    def say(self, what: str, text: str = "") -> None:
        """Model: leave a word (`drained`, `ready`, `error`); an `error` after `ready` says that the engine is gone."""
        self._write(what, text)

    def heard(self, what: str) -> str | None:
        """Launcher: the word that was left, or None."""
        return self._read(what)

    def _write(self, name: str, text: str) -> None:
        if self._folder is None:
            return
        try:
            partial = self._folder / f".{name}.{os.getpid()}.partial"  # instances may say the same at once
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self._folder / name)
        except OSError as error:
            logging.getLogger(__name__).warning("'%s' cannot be written: %s", self._folder / name, error)

    def _read(self, name: str) -> str | None:
        if self._folder is None:
            return None
        try:
            return (self._folder / name).read_text(encoding="utf-8")
        except OSError:
            return None
