"""Writing what is left after a run, with errors a user can act on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from morph_client.errors import BadInput


def make_folder(path: Path) -> None:
    """Makes the folder and its parents. Raises :class:`BadInput` if that cannot be."""
    _or_refuse(path, lambda: path.mkdir(parents=True, exist_ok=True))


def write_json(path: Path, value: Any) -> None:
    """Writes ``value``; raises :class:`BadInput` if the file cannot be written."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8; raises :class:`BadInput` if the file cannot be written."""
    _or_refuse(path, lambda: path.write_text(text, encoding="utf-8"))


def check_writable(path: Path) -> None:
    """Raises :class:`BadInput` now rather than after a long run. Makes the folder; leaves an existing file as it is."""
    make_folder(path.parent)
    _or_refuse(path, lambda: path.open("a").close())


def _or_refuse(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise BadInput(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from None
