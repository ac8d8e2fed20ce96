"""Bad words reach the engine as the token sequences that spell them."""

from __future__ import annotations

import pytest

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.text.bad_words import with_bad_word_ids
from morph_runtime.text.tokenizer import Tokenizer


def ids(tokenizer: Tokenizer, *words: str) -> tuple[tuple[int, ...], ...]:
    return with_bad_word_ids(SamplingParams(bad_words=words), tokenizer).bad_word_ids


def test_without_bad_words_nothing_changes(byte_level: Tokenizer) -> None:
    params = SamplingParams()
    assert with_bad_word_ids(params, byte_level) is params


@pytest.mark.parametrize("word", ["hello", " hello", "fox", "zqx", "é"])
def test_a_word_is_spelt_as_at_the_start_of_a_text(byte_level: Tokenizer, word: str) -> None:
    assert tuple(byte_level.encode(word.strip())) in ids(byte_level, word)
    assert all(byte_level.decode(spelt).strip() == word.strip() for spelt in ids(byte_level, word))


def test_and_after_a_space_where_that_is_another_token(byte_level: Tokenizer) -> None:
    bare, spaced = byte_level.encode("quick"), byte_level.encode(" quick")
    assert len(ids(byte_level, "quick")) == (2 if len(bare) == len(spaced) and bare[0] != spaced[0] else 1)


def test_no_begin_token_is_part_of_a_word(sentencepiece: Tokenizer) -> None:
    begin = sentencepiece.encode("hello")[0]
    assert all(begin not in spelt for spelt in ids(sentencepiece, "hello", "a"))
