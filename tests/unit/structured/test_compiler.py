"""Grammars are compiled once while they stay in the cache, which is bounded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from morph_runtime.engine.messages import StructuredOutputs
from morph_runtime.errors import RequestError
from morph_runtime.structured.compiler import GrammarCompiler
from morph_runtime.structured.matcher import COMPLAINT_CHARS, complaint
from tiny_model import EOS_ID, tiny_tokenizer

VOCAB = 320
Make = Callable[..., GrammarCompiler]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[GrammarCompiler] = []
    tiny_tokenizer(VOCAB).save(str(tmp_path / "tokenizer.json"))

    def make(cache: int = 2, wake: Callable[[], None] = lambda: None) -> GrammarCompiler:
        made.append(GrammarCompiler(tmp_path / "tokenizer.json", VOCAB, (EOS_ID,), cache, wake))
        return made[-1]

    yield make
    for compiler in made:
        compiler.close()


def regex(text: str) -> StructuredOutputs:
    return StructuredOutputs("regex", text)


def test_tokens_that_the_model_was_not_made_for_are_left_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(VOCAB)
    model_vocab = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<pad>", "<more>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with contextlib.closing(GrammarCompiler(tmp_path / "tokenizer.json", model_vocab, (EOS_ID,), 0)) as compiler:
        matcher = compiler.compile(regex("a<pad>")).result(30).matcher()
        matcher.advance(tokenizer.encode("a<").ids, 0)
        assert not matcher.error
        mask = matcher.inner.compute_bitmask()
    allowed = [token for token in range(len(mask) * 8) if mask[token // 8] >> token % 8 & 1]
    assert allowed and max(allowed) < model_vocab
    assert all(tokenizer.id_to_token(token).startswith("p") for token in allowed)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"added_tokens": [{"id": "x"}]}', "[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_a_request_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    compiler = GrammarCompiler(tmp_path / "tokenizer.json", VOCAB, (EOS_ID,), 0)
    with contextlib.closing(compiler), pytest.raises(RequestError, match="its tokenizer cannot be used"):
        compiler.compile(regex("a")).result(30)


def test_a_definition_is_compiled_once_and_shared(make: Make) -> None:
    compiler = make()
    assert compiler.compile(regex("a")) is compiler.compile(regex("a"))
    first, second = (compiler.compile(regex("ab")).result().matcher() for _ in range(2))
    first.advance([tiny_tokenizer(VOCAB).token_to_id("a")], 0)
    second.advance([], 0)
    assert first.inner.compute_bitmask() != second.inner.compute_bitmask()


def test_the_least_recently_used_goes_first(make: Make) -> None:
    compiler = make(cache=2)
    a, b = compiler.compile(regex("a")), compiler.compile(regex("b"))
    assert compiler.compile(regex("a")) is a
    compiler.compile(regex("c"))
    assert compiler.compile(regex("a")) is a
    assert compiler.compile(regex("b")) is not b


def test_without_a_cache_each_request_compiles(make: Make) -> None:
    compiler = make(cache=0)
    assert compiler.compile(regex("a")) is not compiler.compile(regex("a"))


def test_white_space_tells_two_schemas_apart(make: Make) -> None:
    compiler = make()
    tight, wide = (compiler.compile(StructuredOutputs("json", "{}", space)).result() for space in ("", " {1,3}"))
    assert tight is not wide


def test_the_step_loop_is_woken_when_a_grammar_is_ready_or_refused(make: Make) -> None:
    for text in ("a", "("):
        woken = threading.Event()
        future = make(wake=woken.set).compile(regex(text))
        assert woken.wait(10) and future.done()
    with pytest.raises(RequestError, match="structured_outputs: the regex is refused"):
        future.result()


@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutputs("json", '{"a":' * 300 + "1" + "}" * 300),
        StructuredOutputs("regex", "(" * 5000 + "a" + ")" * 5000),
        StructuredOutputs("grammar", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000),
        StructuredOutputs("json", '{"$ref":"#"}'),
        StructuredOutputs("json", '{"type":"object"}', "("),
        StructuredOutputs("choice", "not JSON"),
    ],
    ids=lambda wanted: wanted.text[:12],
)
def test_a_hostile_definition_is_a_request_error(make: Make, wanted: StructuredOutputs) -> None:
    with pytest.raises(RequestError, match="is refused by the grammar library"):
        make().compile(wanted).result(30)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["json", "regex", "choice", "grammar"]), text=st.text("()[]{}|*+?.\\ab\"':=,%<>#0é😀 \n"))
def test_any_text_gives_a_grammar_or_a_request_error(make: Make, kind: str, text: str) -> None:
    compiler = make()
    with contextlib.suppress(RequestError):
        compiler.compile(StructuredOutputs(kind, text)).result(30)
    compiler.close()


@pytest.mark.parametrize(
    "text, said",
    [
        ("regex parse error:\n    (a\n    ^\nerror: unclosed group\n", "unclosed group"),
        ("NoExtensionBias\n<non-verbose/>", "nothing can match it"),
        ("Invalid type: objec", "Invalid type: objec"),
        ("", "the grammar library gives no reason"),
        ("x" * 500, "x" * COMPLAINT_CHARS + "…"),
    ],
)
def test_a_complaint_is_one_short_sentence(text: str, said: str) -> None:
    assert complaint(text) == said
