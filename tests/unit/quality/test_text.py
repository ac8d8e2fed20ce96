"""Windows of a text."""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from morph_runtime.errors import ConfigError
from morph_runtime.profile.text import read_windows

WORDS = ["alpha", "beta", "gamma", "a"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of whole words, with nothing around a text."""
    tokenizer = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, **{w: i for i, w in enumerate(WORDS, 2)}, "?": 9}, "?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, words: int) -> Path:
    path = folder / "text.txt"
    path.write_text(" ".join(WORDS[i % 3] for i in range(words)))
    return path


def test_windows_follow_each_other_from_the_beginning(folder: Path) -> None:
    text = write(folder, 50)
    found = read_windows(text, folder, 16, 2)
    assert found.tokens == (tuple(2 + i % 3 for i in range(16)), tuple(2 + i % 3 for i in range(16, 32)))
    assert (found.lead, found.first, found.length, found.predicted) == (0, 1, 16, 30)
    read = text.read_bytes()[: 8 * 16 * 2]
    assert found.sha256 == hashlib.sha256(read).hexdigest()
    assert found.bytes_per_token == pytest.approx(len(read) / len(read.split()))


def test_the_last_window_that_is_not_whole_is_left_out(folder: Path) -> None:
    assert len(read_windows(write(folder, 47), folder, 16, 9).tokens) == 2
    assert len(read_windows(write(folder, 48), folder, 16, 9).tokens) == 3


def test_each_window_begins_with_what_the_tokenizer_puts_before_a_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    found = read_windows(write(folder, 50), folder, 16, 2)
    assert [window[:2] for window in found.tokens] == [(0, 2), (0, 2)]  # the second one's text begins at word 15
    assert not any(1 in window for window in found.tokens)
    assert (found.lead, found.first, found.predicted) == (1, 1, 30)


def test_a_packed_text_is_unpacked(folder: Path) -> None:
    text = write(folder, 50)
    packed = folder / "text.txt.xz"
    packed.write_bytes(lzma.compress(text.read_bytes()))
    plain, unpacked = (read_windows(path, folder, 16, 3) for path in (text, packed))
    assert (plain.tokens, plain.sha256) == (unpacked.tokens, unpacked.sha256)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("short.txt", b"alpha beta", "has 2 tokens, but a window takes 16"),
        ("latin.txt", b"\xe4\xf6" * 40, "is not UTF-8"),
        ("bad.xz", b"no archive", "cannot be unpacked"),
        ("cut.xz", lzma.compress(b"alpha " * 30)[:-20], "cannot be unpacked"),
        ("none.txt", None, "cannot be read: No such file"),
    ],
)
def test_a_text_that_will_not_do_is_refused_in_one_sentence(
    folder: Path, name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        read_windows(folder / name, folder, 16, 2)
    assert "\n" not in str(caught.value) and name in str(caught.value)
