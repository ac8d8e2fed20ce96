"""Windows of a text, to measure on."""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import dataclass
from pathlib import Path

from morph_runtime.errors import ConfigError
from morph_runtime.text.tokenizer import Tokenizer

CHARACTERS_PER_TOKEN = 8
"""Read for each token that is wanted: enough for any ordinary text, and tokenizing a whole corpus takes minutes."""


@dataclass(frozen=True)
class Windows:
    """Pieces of one text, from its beginning, of equal length."""

    tokens: tuple[tuple[int, ...], ...]
    """Each begins with what the tokenizer puts before a text, such as a BOS."""
    lead: int
    """Tokens of that: they are not predicted."""
    bytes_per_token: float
    """UTF-8 bytes of the text per token."""
    name: str
    """Of the file."""
    sha256: str
    """Of the characters that were read, in UTF-8."""

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return len(self.tokens[0])

    @property
    def first(self) -> int:
        """Index of the first token that is predicted: of a window without a lead, the second."""
        return max(1, self.lead)

    @property
    def predicted(self) -> int:
        """Tokens that are predicted, over all windows."""
        return len(self.tokens) * (self.length - self.first)


def read_windows(path: Path, folder: Path, length: int, count: int) -> Windows:
    """Cut up to `count` windows of `length` tokens.

    Args:
        path: the text, UTF-8; `.xz` is unpacked.
        folder: of the model, for its tokenizer.
        length: tokens of a window.
        count: windows.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or has not one window.
    """
    if length < 16:
        raise ConfigError(f"--window-tokens must be at least 16, but is {length}.")
    if count < 1:
        raise ConfigError(f"--windows must be at least 1, but is {count}.")
    tokenizer = Tokenizer.from_folder(folder)
    text = _read(path, CHARACTERS_PER_TOKEN * length * count)
    stream = tokenizer.encode_plain(text)
    lead = _lead(tokenizer)
    step = length - len(lead)
    starts = range(0, len(stream) - step + 1, step)[:count]
    if not starts:
        raise ConfigError(
            f"--text {path} has {len(stream)} tokens, but a window takes {step}: give a longer text, or lower "
            "--window-tokens."
        )
    data = text.encode()
    return Windows(
        tokens=tuple((*lead, *stream[at : at + step]) for at in starts),
        lead=len(lead),
        bytes_per_token=len(data) / len(stream),
        name=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _read(path: Path, characters: int) -> str:
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
            return file.read(characters)
    except UnicodeDecodeError:
        raise ConfigError(f"--text {path} is not UTF-8: convert it first.") from None
    except (lzma.LZMAError, EOFError) as error:
        raise ConfigError(f"--text {path} cannot be unpacked: {error}.") from None
    except OSError as error:
        raise ConfigError(f"--text {path} cannot be read: {error.strerror or error}.") from None


def _lead(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text; what it may put behind one does not belong into a window."""
    plain, whole = tokenizer.encode_plain("a"), tokenizer.encode("a")
    return tuple(whole[: whole.index(plain[0])]) if plain and plain[0] in whole else ()
