"""Texts that prompts are cut from: a plain text, or meeting transcripts in QMSum's form; also compressed."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from morph_client.errors import BadInput

_OPENERS: dict[str, Callable[..., IO[Any]]] = {".xz": lzma.open, ".gz": gzip.open}


def read_words(path: Path) -> list[str]:
    """The words of a file: UTF-8 text, or JSON lines with ``meeting_transcripts`` if its name says ``.jsonl``.

    A further ``.xz`` or ``.gz`` is unpacked. Raises :class:`BadInput` if the file cannot be used.
    """
    packed = path.suffix.lower() in _OPENERS
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not a UTF-8 text file") from None
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile):
        raise BadInput(f"{path} is not a whole {path.suffix} file") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    words = (_transcripts(text, path) if Path(path.stem if packed else path.name).suffix == ".jsonl" else text).split()
    if not words:
        raise BadInput(f"{path} holds no words")
    return words


def _transcripts(text: str, path: Path) -> str:
    """What was said in the meetings, each turn with its speaker."""
    turns = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            turns += [f"{turn['speaker']}: {turn['content']}" for turn in json.loads(line)["meeting_transcripts"]]
        except (ValueError, KeyError, TypeError):
            raise BadInput(
                f"{path}, line {number}: this is not a meeting in QMSum's form, which has 'meeting_transcripts' of "
                "'speaker' and 'content'"
            ) from None
    return "\n".join(turns)
