from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.errors import RequestError
from morph_runtime.text.parameters import ParameterLimits, parse_sampling_parameters, within_context

LIMITS = ParameterLimits(
    max_tokens=100,
    max_stop_strings=3,
    max_stop_chars=5,
    max_bad_words=2,
    max_token_ids=4,
    max_outputs=8,
    vocab_size=50,
    max_json_bytes=4096,
)


def parse(source: Any) -> SamplingParams:
    return parse_sampling_parameters(source, LIMITS)


@pytest.mark.parametrize("source", [{}, "{}", "", "  ", '{"max_tokens": null}'])
def test_nothing_given_means_vllms_defaults(source: Any) -> None:
    assert parse(source) == SamplingParams()
    assert SamplingParams().max_tokens == 16


@pytest.mark.parametrize("source", ['{"max_tokens": -1, "min_tokens": 20}', '{"max_tokens": "-1", "min_tokens": 20}'])
def test_minus_one_asks_for_all_that_the_context_has_room_for(source: str) -> None:
    params = parse(source)
    assert within_context(params, 30, 100).max_tokens == 70
    assert within_context(params, 100, 100).max_tokens == 1, "too long a prompt is refused elsewhere"
    assert within_context(SamplingParams(max_tokens=7), 30, 100).max_tokens == 7


def test_numbers_may_be_strings() -> None:
    source = '{"temperature":"0.1","max_tokens":"100","min_tokens":" 5 ","top_p":"0.9","top_k":"40","seed":"3"}'
    assert parse(source) == SamplingParams(max_tokens=100, min_tokens=5, temperature=0.1, top_p=0.9, top_k=40, seed=3)


@pytest.mark.parametrize(
    "source, field, value",
    [
        ({"max_tokens": 10.0}, "max_tokens", 10),
        ({"top_k": -1}, "top_k", 0),
        ({"seed": -1}, "seed", None),
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 1e-9}, "temperature", 0.01),
        ({"stop": "ab"}, "stop", ("ab",)),
        ({"stop": ["a", "\x00\n"]}, "stop", ("a", "\x00\n")),
        ({"stop": []}, "stop", ()),
        ({"stop": "[1]"}, "stop", ("[1]",)),
        ({"ignore_eos": "true"}, "ignore_eos", True),
        ({"ignore_eos": "False"}, "ignore_eos", False),
        ({"ignore_eos": 1}, "ignore_eos", True),
        ({"skip_special_tokens": False}, "skip_special_tokens", False),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output", True),
        ({"min_p": "0.5"}, "min_p", 0.5),
        ({"presence_penalty": "-2"}, "presence_penalty", -2.0),
        ({"frequency_penalty": 2}, "frequency_penalty", 2.0),
        ({"repetition_penalty": "1.2"}, "repetition_penalty", 1.2),
        ({"logit_bias": {"3": 1, "4": -500, "5": "200"}}, "logit_bias", ((3, 1.0), (4, -100.0), (5, 100.0))),
        ({"logit_bias": '{"3": 1}'}, "logit_bias", ((3, 1.0),)),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids", (1, 2)),
        ({"stop_token_ids": "[1, 2]"}, "stop_token_ids", (1, 2)),
        ({"bad_words": ["a", "b"]}, "bad_words", ("a", "b")),
        ({"bad_words": "a"}, "bad_words", ("a",)),
        ({"bad_words": '["a", "b"]'}, "bad_words", ("a", "b")),
        ({"bad_words": ' ["["]'}, "bad_words", ("[",)),
        ({"bad_words": "{}"}, "bad_words", ("{}",)),
        ({"n": "3"}, "n", 3),
        ({"logprobs": "0"}, "logprobs", 0),
        ({"logprobs": 20}, "logprobs", 20),
        ({"prompt_logprobs": "2"}, "prompt_logprobs", 2),
    ],
)
def test_values_are_coerced(source: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(parse(source), field) == value
    assert getattr(parse(json.dumps(source)), field) == value


@pytest.mark.parametrize(
    "source",
    [
        {"n": 1}, {"n": "1"}, {"best_of": None}, {"best_of": 1}, {"presence_penalty": 0}, {"frequency_penalty": "0.0"},
        {"repetition_penalty": 1.0}, {"min_p": 0}, {"logprobs": None}, {"prompt_logprobs": None}, {"detokenize": True},
        {"use_beam_search": "false"}, {"stop_token_ids": []}, {"logit_bias": {}}, {"bad_words": []}, {"output_kind": 0},
        {"spaces_between_special_tokens": True}, {"guided_decoding": None}, {"structured_outputs": None},
        {"truncate_prompt_tokens": None}, {"length_penalty": 1},
    ],
)  # fmt: skip
def test_keys_that_vllm_knows_pass_at_their_default(source: dict[str, Any]) -> None:
    assert parse(source) == SamplingParams()


@pytest.mark.parametrize(
    "source, field, said",
    [
        ({"n": 9}, "n", "between 1 and 8"),
        ({"n": 0}, "n", "between 1 and 8"),
        ({"n": 2, "temperature": 0}, "n", "must be 1 with greedy sampling"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"temperature": "1_0"}, "temperature", "finite number"),
        ({"max_tokens": "1_0"}, "max_tokens", "whole number"),
        ({"logit_bias": {"3": "1_0"}}, "logit_bias", "finite number"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "between 0 and 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "between 0 and 20"),
        ({"detokenize": False}, "detokenize", "not supported"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"stop_token_ids": 1}, "stop_token_ids", "list of token ids"),
        ({"stop_token_ids": [1, 50]}, "stop_token_ids", "between 0 and 49"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids", "between 0 and 49"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids", "whole number"),
        ({"stop_token_ids": [1, 2, 3, 4, 5]}, "stop_token_ids", "at most 4 token ids"),
        ({"logit_bias": [1]}, "logit_bias", "object from token ids"),
        ({"logit_bias": "x"}, "logit_bias", "JSON text"),
        ({"logit_bias": {"50": 1}}, "logit_bias", "between 0 and 49"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "whole number"),
        ({"logit_bias": {"1": "nan"}}, "logit_bias", "finite"),
        ({"logit_bias": {str(i): 1 for i in range(5)}}, "logit_bias", "at most 4 tokens"),
        ({"bad_words": [""]}, "bad_words", "a bad word must not be empty"),
        ({"bad_words": [1]}, "bad_words", "list of strings"),
        ({"bad_words": ["a"] * 3}, "bad_words", "at most 2 bad words"),
        ({"bad_words": "[1]"}, "bad_words", "list of strings"),
        ({"bad_words": "[a]"}, "bad_words", "begins with '[' must be the JSON text of a list"),
        ({"bad_words": ["123456"]}, "bad_words", "at most 5 characters"),
        ({"min_p": 1.1}, "min_p", "between 0 and 1"),
        ({"min_p": -0.1}, "min_p", "between 0 and 1"),
        ({"min_p": "x"}, "min_p", "finite"),
        ({"presence_penalty": 2.1}, "presence_penalty", "between -2 and 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"repetition_penalty": "-1"}, "repetition_penalty", "above 0"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"logprobs": -1}, "logprobs", "between 0 and 20"),
        ({"lora_name": "x"}, "lora_name", "LoRA feature is not enabled."),
        ({"max_token": 5}, "max_token", "unknown sampling parameter"),
        ({"": 5}, "", "unknown"),
        ({"max_tokens": 0}, "max_tokens", "between 1 and 100"),
        ({"max_tokens": 101}, "max_tokens", "between 1 and 100"),
        ({"max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"max_tokens": True}, "max_tokens", "whole number"),
        ({"max_tokens": "x"}, "max_tokens", "whole number"),
        ({"max_tokens": []}, "max_tokens", "whole number"),
        ({"max_tokens": "9" * 6000}, "max_tokens", "between 1 and 100"),
        ({"max_tokens": 10**100}, "max_tokens", "between 1 and 100"),
        ({"max_tokens": "１"}, "max_tokens", "whole number"),
        ({"max_tokens": float("inf")}, "max_tokens", "whole number"),
        ({"min_tokens": -1}, "min_tokens", "between 0 and 100"),
        ({"min_tokens": 20}, "min_tokens", "at most max_tokens, which is 16"),
        ({"temperature": -0.1}, "temperature", "between 0 and 100"),
        ({"temperature": "nan"}, "temperature", "finite"),
        ({"temperature": "-inf"}, "temperature", "finite"),
        ({"temperature": 10**400}, "temperature", "finite"),
        ({"temperature": {}}, "temperature", "finite"),
        ({"temperature": True}, "temperature", "finite"),
        ({"top_p": 0}, "top_p", "above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p", "above 0 and at most 1"),
        ({"top_k": -2}, "top_k", "between -1"),
        ({"seed": 2**63}, "seed", "between -1"),
        ({"ignore_eos": "yes"}, "ignore_eos", "true or false"),
        ({"ignore_eos": 2}, "ignore_eos", "true or false"),
        ({"stop": 5}, "stop", "string or a list"),
        ({"stop": [5]}, "stop", "string or a list"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["a"] * 4}, "stop", "at most 3 stop strings"),
        ({"stop": "123456"}, "stop", "at most 5 characters"),
        ({"stop": "\ud800"}, "stop", "valid Unicode"),
    ],
)  # fmt: skip
def test_bad_values_name_field_and_limit(source: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(source)
    assert caught.value.field == field
    assert said in str(caught.value)
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "not valid JSON"),
        ("[]", "a list"),
        ("3", "a number"),
        ("null", "null"),
        ('"{}"', "a string"),
        ('{"temperature": NaN}', "NaN is not a number"),
        ('{"temperature": -Infinity}', "-Infinity is not"),
        ('{"temperature": 1e400}', "finite"),
        ('{"max_tokens": ' + "9" * 4000 + "}", "between 1 and 100"),
        ("[" * 3000, "JSON"),
        ('{"stop": "' + "x" * 5000 + '"}', "at most 4096 bytes"),
        ('{"a": "\ud800"}', "unknown"),
    ],
)
def test_bad_json(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=r"^\S*: ") as caught:
        parse(text)
    assert said in str(caught.value)


def test_a_number_longer_than_python_reads_is_an_error() -> None:
    with pytest.raises(RequestError):
        parse_sampling_parameters('{"max_tokens": ' + "9" * 9000 + "}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "n", "min_p",
        "presence_penalty", "repetition_penalty", "logit_bias", "stop_token_ids", "bad_words", "logprobs",
        "structured_outputs", "guided_json", "guided_decoding",
    ]
)  # fmt: skip


@given(st.dictionaries(KEYS | st.text(max_size=5), JSON, max_size=4))
def test_any_mapping_gives_valid_parameters_or_a_request_error(source: dict[str, Any]) -> None:
    try:
        params = parse(source)
    except RequestError as error:
        str(error).encode("utf-8")
        return
    assert 1 <= params.max_tokens <= 100 and 0 <= params.min_tokens <= params.max_tokens
    assert 0 <= params.temperature <= 100 and 0 < params.top_p <= 1 and params.top_k >= 0


@given(st.text(max_size=50))
def test_any_text_gives_parameters_or_a_request_error(text: str) -> None:
    try:
        parse(text)
    except RequestError:
        return
