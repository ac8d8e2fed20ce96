"""`structured_outputs` in every form in which clients send it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from morph_runtime.engine.messages import StructuredOutputs
from morph_runtime.errors import RequestError
from morph_runtime.text.parameters import parse_sampling_parameters
from morph_runtime.text.structured import MAX_CHOICES, MAX_DEFINITION_CHARS, WHITESPACE

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
JSON = StructuredOutputs("json", json.dumps(SCHEMA), WHITESPACE)
REGEX = StructuredOutputs("regex", "a+")
CHOICE = StructuredOutputs("choice", '["x", "y"]')
GRAMMAR = StructuredOutputs("grammar", 'root ::= "a"')


def parse(source: Any) -> StructuredOutputs | None:
    return parse_sampling_parameters(source).structured_outputs


@pytest.mark.parametrize(
    "value, wanted",
    [
        ({"json": SCHEMA}, JSON),
        ({"json": json.dumps(SCHEMA)}, JSON),
        ({"regex": "a+"}, REGEX),
        ({"choice": ["x", "y"]}, CHOICE),
        ({"grammar": 'root ::= "a"'}, GRAMMAR),
        ({"regex": "a+", "json": None, "choice": None, "disable_any_whitespace": False}, REGEX),
        ({"json": SCHEMA, "disable_any_whitespace": True}, StructuredOutputs("json", json.dumps(SCHEMA))),
        ({"json": SCHEMA, "whitespace_pattern": " ?"}, StructuredOutputs("json", json.dumps(SCHEMA), " ?")),
        ({"json_object": True}, StructuredOutputs("json", '{"type": "object"}', WHITESPACE)),
        ({}, None),
        ({"json": None}, None),
    ],
)
def test_an_object_or_its_json_text_names_the_form(value: Any, wanted: StructuredOutputs | None) -> None:
    assert parse({"structured_outputs": value}) == wanted
    assert parse(json.dumps({"structured_outputs": value})) == wanted
    assert parse({"structured_outputs": json.dumps(value)}) == wanted


@pytest.mark.parametrize(
    "source, wanted",
    [
        ({"guided_json": SCHEMA}, JSON),
        ({"guided_regex": "a+", "guided_json": None}, REGEX),
        ({"guided_choice": ["x", "y"]}, CHOICE),
        ({"guided_choice": '["x", "y"]'}, CHOICE),
        ({"guided_grammar": 'root ::= "a"'}, GRAMMAR),
        ({"guided_decoding": '{"regex": "a+"}'}, REGEX),
        ({"guided_decoding": None, "structured_outputs": None}, None),
    ],
)
def test_the_older_names_mean_the_same(source: Any, wanted: StructuredOutputs | None) -> None:
    assert parse(source) == wanted


@pytest.mark.parametrize(
    "value, said",
    [
        (3, "must be an object"),
        ("{", "the string must be JSON text"),
        ("[]", "must be an object"),
        ({"json": SCHEMA, "regex": "a"}, "exactly one of"),
        ({"disable_any_whitespace": True}, "exactly one of"),
        ({"jsn": SCHEMA}, "unknown key 'jsn'"),
        ({"structural_tag": "x"}, "structural_tag is not supported"),
        ({"json": 3}, "must be a JSON schema"),
        ({"json": "{"}, "JSON text"),
        ({"json": {"a": float("nan")}}, "must be JSON"),
        ({"regex": ""}, "not empty"),
        ({"regex": 5}, "not empty"),
        ({"regex": "\ud800"}, "valid Unicode"),
        ({"choice": []}, "at least one string"),
        ({"choice": [""]}, "must not be empty"),
        ({"choice": [3]}, "list of strings"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, f"at most {MAX_CHOICES}"),
        ({"grammar": "a" * (MAX_DEFINITION_CHARS + 1)}, f"at most {MAX_DEFINITION_CHARS} characters"),
        ({"json": SCHEMA, "whitespace_pattern": 3}, "regular expression"),
        ({"json": SCHEMA, "disable_any_whitespace": "x"}, "true or false"),
    ],
)
def test_what_cannot_be_a_form_is_refused_in_one_sentence(value: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse({"structured_outputs": value})
    assert caught.value.field.startswith("structured_outputs")
    assert said in str(caught.value)
    str(caught.value).encode("utf-8")


def test_two_names_at_once_are_refused() -> None:
    with pytest.raises(RequestError, match="given more than once: guided_json, structured_outputs"):
        parse({"guided_json": SCHEMA, "structured_outputs": {"regex": "a"}})
