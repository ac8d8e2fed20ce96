"""Structured outputs in the engine: in mixed batches, across preemption, and when they cannot be had."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from bench.structured.schemas import random_schema
from engine.conftest import EngineFactory, make_model, run_all, submit
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import Finished, StructuredOutputs
from morph_runtime.structured.compiler import CompiledGrammar, GrammarCompiler
from morph_runtime.text.structured import WHITESPACE
from morph_runtime.text.tokenizer import Tokenizer
from tiny_model import tiny_tokenizer

PROMPT = [5, 6, 7]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def speaking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer; its end token is 0."""
    folder = make_model(tmp_path_factory.mktemp("speaking"), kv_heads=2, vocab=320)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def json_form(schema: Any, whitespace: str = "") -> StructuredOutputs:
    return StructuredOutputs("json", json.dumps(schema), whitespace)


FORMS = {
    1: json_form(SCHEMA, WHITESPACE),
    2: StructuredOutputs("regex", "[a-f]{4}-[0-9]{2}"),
    3: StructuredOutputs("choice", json.dumps(["yes", 'no "way"', "naïve ☃"])),
    4: StructuredOutputs("grammar", 'root ::= "(" root ")" | "x"'),
    5: json_form(SCHEMA),
}


def is_valid(key: int, text: str) -> bool:
    if key in (1, 5):
        return Draft202012Validator(SCHEMA).is_valid(json.loads(text))
    if key == 3:
        return text in json.loads(FORMS[3].text)
    if key == 4:
        return re.fullmatch(r"\(*x\)*", text) is not None and text.count("(") == text.count(")")
    return re.fullmatch(FORMS[key].text, text) is not None


def ask(engine: Engine, key: int, form: StructuredOutputs | None, max_tokens: int = 120, **params: Any) -> None:
    given = {"temperature": 1.0, "seed": key, "ignore_eos": False, **params}
    submit(engine, key, PROMPT, max_tokens, structured_outputs=form, **given)


def ends(engine: Engine) -> tuple[dict[int, list[int]], dict[int, Finished]]:
    """Tokens and ends by key, once nothing is left."""
    tokens: dict[int, list[int]] = {}
    finished: dict[int, Finished] = {}
    while engine.has_requests:
        out = engine.step(decide=False)
        for delta in out.tokens if out else ():
            tokens.setdefault(delta.key, []).extend(delta.tokens)
        finished.update({end.key: end for end in (out.finished if out else ())})
    return tokens, finished


def test_every_form_holds_in_a_batch_with_plain_requests(engines: EngineFactory, speaking_model: Path) -> None:
    tokenizer = Tokenizer.from_folder(speaking_model)
    alone = engines(speaking_model)
    submit(alone, 9, PROMPT, 20)
    plain = run_all(alone)[9]
    engine = engines(speaking_model)
    for key, form in FORMS.items():
        ask(engine, key, form)
    submit(engine, 9, PROMPT, 20)
    tokens, finished = ends(engine)
    assert tokens[9] == plain
    for key in FORMS:
        assert finished[key].reason == "stop"
        assert is_valid(key, tokenizer.decode(tokens[key]))


def test_a_preempted_request_goes_on_where_it_was(engines: EngineFactory, speaking_model: Path) -> None:
    results = []
    for kv_tokens in (512, 80):
        engine = engines(speaking_model, memory={"kv_tokens": kv_tokens}, model={"max_model_len": 64})
        for key in range(1, 6):
            ask(engine, key, StructuredOutputs("regex", "[a-f]{20}(-[a-f]{5}){3}"), 60)
        tokens, finished = ends(engine)
        results.append((tokens, [f.reason for f in finished.values()]))
        preempted = engine.parts.scheduler.preemptions
    assert preempted > 0
    assert results[0][1] == ["stop"] * 5
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "form, said",
    [
        (json_form({"type": "objec"}), "the json is refused by the grammar library: Invalid type: objec."),
        (json_form({"not": {}}), "Unimplemented keys"),
        (json_form({"type": "integer", "minimum": 3, "maximum": 1}), "Unsatisfiable schema"),
        (StructuredOutputs("regex", "(a"), "unclosed group"),
        (StructuredOutputs("regex", "(?=a)b"), "look-around"),
        (StructuredOutputs("regex", r"[^\s\S]"), "nothing can match it"),
        (StructuredOutputs("grammar", "%$#"), "the grammar is refused"),
        (StructuredOutputs("grammar", 'start: "a" | b'), "unknown name"),
        (StructuredOutputs("regex", "(a{1000}){1000}"), "too many expressions"),
    ],
)
def test_a_refused_form_ends_its_request_alone_with_one_sentence(
    engines: EngineFactory, speaking_model: Path, form: StructuredOutputs, said: str
) -> None:
    engine = engines(speaking_model)
    ask(engine, 1, form)
    ask(engine, 2, FORMS[2])
    tokens, finished = ends(engine)
    assert (finished[1].reason, finished[2].reason) == ("invalid", "stop")
    assert finished[1].detail.startswith("structured_outputs: ") and said in finished[1].detail
    assert "\n" not in finished[1].detail and len(finished[1].detail) < 320
    assert len(tokens.get(1, ())) < 5


def test_nothing_stays_of_a_refused_request_that_asked_for_its_history(
    engines: EngineFactory, speaking_model: Path
) -> None:
    engine = engines(speaking_model)
    ask(engine, 1, json_form({"type": "objec"}), history=True)
    assert engine.parts.intake.num_held == 1 and engine._histories.any_kept
    assert ends(engine)[1][1].reason == "invalid"
    assert not engine._histories.any_kept


def test_a_model_without_a_tokenizer_says_so(engines: EngineFactory, tiny_model: Path) -> None:
    engine = engines(tiny_model)
    ask(engine, 1, FORMS[2])
    assert "its tokenizer cannot be used" in ends(engine)[1][1].detail


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Holds every compilation until it is set."""
    gate, compile_ = threading.Event(), GrammarCompiler._compile

    def slowly(self: GrammarCompiler, wanted: StructuredOutputs) -> CompiledGrammar:
        assert gate.wait(30)
        return compile_(self, wanted)

    monkeypatch.setattr(GrammarCompiler, "_compile", slowly)
    return gate


def test_others_run_on_while_a_grammar_is_compiled(
    engines: EngineFactory, speaking_model: Path, gate: threading.Event
) -> None:
    engine = engines(speaking_model)
    ask(engine, 1, FORMS[2])
    submit(engine, 2, PROMPT, 6)
    for _ in range(6):
        out = engine.step(decide=False)
        assert out is not None and [delta.key for delta in out.tokens] == [2] and out.waiting == 1
    assert engine.has_requests and engine.step(decide=False) is None
    gate.set()
    assert ends(engine)[1][1].reason == "stop"


def test_a_request_can_be_cancelled_while_its_grammar_is_compiled(
    engines: EngineFactory, speaking_model: Path, gate: threading.Event
) -> None:
    engine = engines(speaking_model)
    ask(engine, 1, FORMS[2])
    engine.cancel(1)
    assert not engine.has_requests
    out = engine.step(decide=False)
    assert out is not None and [(f.key, f.reason) for f in out.finished] == [(1, "cancelled")]
    gate.set()


@pytest.mark.parametrize(
    "params",
    [
        {"min_tokens": 40},
        {"ignore_eos": True},
        {"min_tokens": 40, "ignore_eos": True, "stop_token_ids": (0,)},
        {"bad_word_ids": tuple((token,) for token in range(320))},
        {"logit_bias": ((0, 100.0), (7, 100.0)), "temperature": 0.0},
        {"repetition_penalty": 3.0, "presence_penalty": 2.0},
        {"top_k": 1, "min_p": 1.0},
    ],
)
def test_the_grammar_wins_over_every_other_parameter(
    engines: EngineFactory, speaking_model: Path, params: dict[str, Any]
) -> None:
    engine = engines(speaking_model)
    ask(engine, 2, FORMS[2], 60, **params)
    tokens, finished = ends(engine)
    text = Tokenizer.from_folder(speaking_model).decode(tokens[2])
    assert is_valid(2, text)
    assert (finished[2].reason, finished[2].detail) == ("stop", "")


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_choice_shorter_than_min_tokens_ends_there_and_plain_requests_go_on(
    engines: EngineFactory, speaking_model: Path, overlap: str
) -> None:
    engine = engines(speaking_model, overlap=overlap)
    ask(engine, 1, StructuredOutputs("choice", '["yes", "no"]'), 20, min_tokens=12)
    ask(engine, 2, None, 20, ignore_eos=True, logit_bias=((0, 100.0),))
    tokens, finished = ends(engine)
    assert Tokenizer.from_folder(speaking_model).decode(tokens[1]) in ("yes", "no")
    assert (finished[1].reason, finished[2].reason) == ("stop", "length")
    assert tokens[1][-1] == 0 and tokens[2] == [0] * 20


def test_log_probabilities_are_those_under_the_grammar(engines: EngineFactory, speaking_model: Path) -> None:
    engine = engines(speaking_model)
    ask(engine, 3, StructuredOutputs("choice", '["x"]'), logprobs=1)
    out = engine.step(decide=False)
    while out is None:
        out = engine.step(decide=False)
    (scores,) = out.tokens[0].logprobs
    assert (scores.rank, scores.values) == (1, [0.0, 0.0])


def test_random_bounded_schemas_give_valid_output(engines: EngineFactory, speaking_model: Path) -> None:
    count = 24
    engine = engines(speaking_model, model={"max_model_len": 256}, memory={"kv_tokens": 2048})
    for seed in range(count):
        ask(engine, seed, json_form(random_schema(seed, depth=2)), 250)
    tokens, finished = ends(engine)
    tokenizer = Tokenizer.from_folder(speaking_model)
    stopped = [seed for seed in range(count) if finished[seed].reason == "stop"]
    assert len(stopped) >= 0.9 * count
    for seed in stopped:
        validator = Draft202012Validator(random_schema(seed, 2), format_checker=Draft202012Validator.FORMAT_CHECKER)
        validator.validate(json.loads(tokenizer.decode(tokens[seed])))
