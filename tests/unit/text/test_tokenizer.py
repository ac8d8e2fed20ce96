from __future__ import annotations

from pathlib import Path

import pytest

from morph_runtime.errors import ConfigError, RequestError
from morph_runtime.text.tokenizer import Tokenizer, check_context, decode_utf8


def test_a_missing_or_broken_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_it_reads_what_was_saved(tmp_path: Path, byte_level: Tokenizer) -> None:
    byte_level.backend.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode("hello ☃") == byte_level.encode("hello ☃")
    assert again.decoder_type == "ByteLevel"


def test_special_tokens_come_from_the_post_processor_alone(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.decode(byte_level.encode("hi"), skip_special_tokens=False) == "hi"
    assert sentencepiece.encode("a")[0] == 1


def test_truncation_and_padding_of_the_file_do_not_count(byte_level: Tokenizer) -> None:
    from tokenizers import Tokenizer as HfTokenizer

    backend = HfTokenizer.from_str(byte_level.backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    assert Tokenizer(backend).encode("hello world") == byte_level.encode("hello world")


def test_prompts_are_checked(byte_level: Tokenizer) -> None:
    assert byte_level.encode_prompt("a b", 8) == byte_level.encode("a b")
    with pytest.raises(RequestError, match="text_input: the prompt must not be empty"):
        byte_level.encode_prompt("", 8)
    with pytest.raises(RequestError, match=r"text_input: the prompt has \d+ tokens, but the model takes at most 2"):
        byte_level.encode_prompt("z z z z", 2)
    with pytest.raises(RequestError, match="characters, too many tokens: the model takes at most 2"):
        byte_level.encode_prompt("z" * 10_000_000, 2)
    with pytest.raises(RequestError, match="valid UTF-8"):
        byte_level.encode_prompt("\ud800", 8)


def test_a_prompt_without_tokens_is_an_error(byte_level: Tokenizer) -> None:
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import normalizers

    backend = HfTokenizer.from_str(byte_level.backend.to_str())
    backend.normalizer = normalizers.Strip()
    with pytest.raises(RequestError, match="gives no tokens"):
        Tokenizer(backend).encode_prompt("  ", 8)


def test_invalid_utf8_names_the_byte() -> None:
    assert decode_utf8("é".encode()) == "é"
    with pytest.raises(RequestError, match=r"text_input: must be valid UTF-8 \(byte 1 is not\)"):
        decode_utf8(b"a\xff")


def test_the_context_limit_names_max_tokens() -> None:
    check_context(6, 4, 10)
    with pytest.raises(RequestError, match=r"max_tokens: must be at most 4 .* context of 10 tokens"):
        check_context(6, 5, 10)
