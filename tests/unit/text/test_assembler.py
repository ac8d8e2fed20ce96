from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from morph_runtime.engine.messages import SamplingParams, StructuredOutputs
from morph_runtime.text.assembler import OutputAssembler
from morph_runtime.text.detokenizer import make_detokenizer
from morph_runtime.text.tokenizer import Tokenizer

VOCAB = 320
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=40)
CUTS = st.lists(st.integers(1, 7), min_size=1, max_size=40)
TEXT = st.text(st.sampled_from("ab c☃😀é\ufffd👩‍👩‍👧"), max_size=30)


def assemble(
    tokenizer: Tokenizer, tokens: list[int], cuts: list[int], sampling: SamplingParams, prompt: Sequence[int] = ()
) -> tuple[list[str], int, str | None]:
    """Deltas, counted tokens and finish reason when the tokens come in groups of `cuts`, repeated."""
    assembler = OutputAssembler(tokenizer, sampling, prompt=prompt)
    deltas, count, reason, at, turn = [], 0, None, 0, 0
    while at < len(tokens):
        size = cuts[turn % len(cuts)]
        delta = assembler.push(tokens[at : at + size])
        deltas.append(delta.text)
        count += delta.n_tokens
        reason = reason or delta.finish_reason
        at, turn = at + size, turn + 1
    last = assembler.flush()
    deltas.append(last.text)
    assert assembler.n_tokens == count
    return deltas, count, reason or last.finish_reason


@settings(deadline=None)
@given(st.lists(st.sampled_from(["ab", "c", "a", "☃", "é", " "]), min_size=1, max_size=30), st.data(), CUTS)
@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_prompt_and_output_fit_together_wherever_the_output_begins(
    request: pytest.FixtureRequest, kind: str, words: list[str], data: st.DataObject, cuts: list[int]
) -> None:
    """As in vLLM: the space between two words is not lost where the output begins with the second one."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer.encode(" ".join(words))
    at = data.draw(st.integers(0, len(tokens)))
    prompt = tokenizer.decode(tokens[:at])
    assume(not prompt.endswith("\ufffd"))  # half a character: nothing follows it that would be whole
    deltas, _, _ = assemble(tokenizer, tokens[at:], cuts, SamplingParams(), tokens[:at])
    assert prompt + "".join(deltas) == tokenizer.decode(tokens)


def test_a_stop_string_that_begins_with_a_space_fires_at_once(sentencepiece: Tokenizer) -> None:
    tokens = sentencepiece.encode("ab ab c")
    prompt = sentencepiece.encode("ab")
    assembler = OutputAssembler(sentencepiece, SamplingParams(stop=(" ab",)), prompt=prompt)
    delta = assembler.push(tokens[len(prompt) :])
    assert (delta.text, delta.finish_reason) == ("", "stop")


@settings(deadline=None)
@given(TOKENS, CUTS, st.booleans())
def test_joined_deltas_are_the_full_text_for_any_tokens(
    byte_level: Tokenizer, tokens: list[int], cuts: list[int], skip: bool
) -> None:
    deltas, count, _ = assemble(byte_level, tokens, cuts, SamplingParams(skip_special_tokens=skip))
    assert "".join(deltas) == byte_level.decode(tokens, skip_special_tokens=skip)
    assert count == len(tokens)


@settings(deadline=None)
@given(TEXT, CUTS)
def test_no_delta_holds_half_a_character(byte_level: Tokenizer, text: str, cuts: list[int]) -> None:
    deltas, _, _ = assemble(byte_level, byte_level.encode(text), cuts, SamplingParams())
    assert "".join(deltas) == text
    assert sum(d.count("\ufffd") for d in deltas) == text.count("\ufffd")


@settings(deadline=None)
@given(TEXT, CUTS)
def test_the_window_detokenizer_gives_the_text_back(sentencepiece: Tokenizer, text: str, cuts: list[int]) -> None:
    tokens = sentencepiece.encode(text)
    deltas, _, _ = assemble(sentencepiece, tokens, cuts, SamplingParams())
    assert "".join(deltas) == sentencepiece.decode(tokens)


@settings(deadline=None)
@given(st.lists(st.integers(0, 269), max_size=40), CUTS)
def test_the_window_detokenizer_does_not_depend_on_the_grouping(
    sentencepiece: Tokenizer, tokens: list[int], cuts: list[int]
) -> None:
    one_by_one, _, _ = assemble(sentencepiece, tokens, [1], SamplingParams())
    grouped, _, _ = assemble(sentencepiece, tokens, cuts, SamplingParams())
    assert "".join(grouped) == "".join(one_by_one)


def test_a_skipped_token_does_not_cost_the_space_behind_it(sentencepiece: Tokenizer) -> None:
    ids = [sentencepiece.backend.token_to_id(t) for t in ("▁hello", "</s>", "</s>", "▁world")]
    detokenizer = make_detokenizer(sentencepiece)
    assert [detokenizer.push([i]) for i in ids] == ["hello", "", "", " world"]


def test_many_skipped_tokens_are_not_kept(sentencepiece: Tokenizer) -> None:
    detokenizer = make_detokenizer(sentencepiece)
    hello, end = (sentencepiece.backend.token_to_id(t) for t in ("▁hello", "</s>"))
    assert detokenizer.push([hello]) == "hello"
    assert [detokenizer.push([end]) for _ in range(100)] == [""] * 100
    assert len(detokenizer._held) < 10  # type: ignore[attr-defined]
    assert detokenizer.push([hello]) == " hello"


def test_an_endless_run_of_bad_bytes_is_not_held_for_ever(sentencepiece: Tokenizer) -> None:
    detokenizer = make_detokenizer(sentencepiece)
    bad = sentencepiece.backend.token_to_id("<0xFF>")
    texts = [detokenizer.push([bad]) for _ in range(40)]
    assert "\ufffd" in "".join(texts)


def test_an_unknown_id_is_no_text(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece):
        assert OutputAssembler(tokenizer, SamplingParams()).push([10_000_000]).text == ""


STOPS = st.lists(st.sampled_from(["ab", "aba", "b c", "☃", "😀é", "c", "a b", "aa", "cab"]), min_size=1, max_size=3)


@settings(deadline=None, max_examples=200)
@given(TEXT, STOPS, CUTS, st.booleans())
@example("abab c", ["aba", "b c"], [1], False)
def test_the_first_complete_stop_string_ends_the_text_however_it_is_grouped(
    byte_level: Tokenizer, text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    tokens = byte_level.encode(text)
    sampling = SamplingParams(stop=tuple(stops), include_stop_str_in_output=include)
    deltas, count, reason = assemble(byte_level, tokens, cuts, sampling)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    if not ends:
        assert "".join(deltas) == text and reason is None and count == len(tokens)
        return
    end, start = min(ends)
    assert "".join(deltas) == text[: end if include else start]
    assert reason == "stop"
    assert (deltas, count)[1] == assemble(byte_level, tokens, [1], sampling)[1]
    shown = byte_level.decode(tokens[:count])
    assert len(shown) >= end > len(byte_level.decode(tokens[: count - 1]).rstrip("\ufffd")) - 3


def test_only_what_could_become_a_stop_string_is_held_back(byte_level: Tokenizer) -> None:
    assembler = OutputAssembler(byte_level, SamplingParams(stop=("xyz",)))
    texts = [assembler.push(byte_level.encode(char)).text for char in ("a", "x", "y", "b", "x")]
    assert texts == ["a", "", "", "xyb", ""]
    assert assembler.flush().text == "x"


def test_tokens_after_a_stop_string_do_not_count(byte_level: Tokenizer) -> None:
    assembler = OutputAssembler(byte_level, SamplingParams(stop=("x",)))
    delta = assembler.push(byte_level.encode("zqxkk"))
    assert (delta.text, delta.n_tokens, delta.finish_reason) == ("zq", 3, "stop")
    assert assembler.stopped
    assert assembler.push([5, 6]).n_tokens == 0
    assert assembler.flush().text == ""


def test_a_stop_string_does_not_count_before_min_tokens(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("zxqxk")
    assembler = OutputAssembler(byte_level, SamplingParams(stop=("x",), min_tokens=2, max_tokens=9))
    delta = assembler.push(tokens)
    assert (delta.text, delta.n_tokens) == ("zxq", 4)


@pytest.mark.parametrize("ignore_eos, text", [(False, "z"), (True, "z<|end|>")])
def test_the_token_that_ends_the_output_is_no_text(byte_level: Tokenizer, ignore_eos: bool, text: str) -> None:
    sampling = SamplingParams(skip_special_tokens=False, ignore_eos=ignore_eos)
    assembler = OutputAssembler(byte_level, sampling, eos_token_ids=[0])
    delta = assembler.push([*byte_level.encode("z"), 0])
    assert (delta.text, delta.n_tokens) == (text, 2)


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 9}, {"min_tokens": 9, "stop_token_ids": (0,)}])
def test_the_token_that_ends_a_grammar_is_no_text(byte_level: Tokenizer, params: dict[str, Any]) -> None:
    form = StructuredOutputs("regex", "z")
    sampling = SamplingParams(skip_special_tokens=False, structured_outputs=form, **params)
    delta = OutputAssembler(byte_level, sampling, eos_token_ids=[0]).push([*byte_level.encode("z"), 0])
    assert (delta.text, delta.n_tokens) == ("z", 2)


def test_an_incomplete_character_at_the_end_becomes_a_replacement(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("𝄞")
    assembler = OutputAssembler(byte_level, SamplingParams())
    assert assembler.push(tokens[:-1]).text == ""
    assert assembler.flush().text == "\ufffd"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_counts_but_is_text_only_when_asked_for(byte_level: Tokenizer, include: bool) -> None:
    tokens = byte_level.encode("hello world")
    last = tokens[-1]
    sampling = SamplingParams(stop_token_ids=(last,), ignore_eos=True, include_stop_str_in_output=include)
    assembler = OutputAssembler(byte_level, sampling, (0,))
    shown = assembler.push(tokens).text + assembler.flush().text
    assert shown == byte_level.decode(tokens if include else tokens[:-1])
    assert assembler.n_tokens == len(tokens)
