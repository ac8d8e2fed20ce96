"""Sampling parameters as clients send them, turned into `SamplingParams`.

Names, defaults and coercions are those of vLLM and of Triton's vLLM backend: numbers may come as
strings. A key that vLLM knows and we do not serve passes at its default value only; any other key
is an error, so that a misspelt one is never ignored in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.errors import RequestError
from morph_runtime.text.structured import structured_outputs, with_current_names
from morph_runtime.text.values import (
    json_type,
    printable,
    read_boolean,
    read_integer,
    read_nested,
    read_number,
    read_number_between,
    read_strings,
    read_token_ids,
    shown,
)

PARAMETERS_FIELD = "sampling_parameters"

TO_THE_END = -1
"""`max_tokens` for "until the context is full", whatever room the prompt leaves in it."""

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_MIN_TEMPERATURE = 0.01
"""vLLM raises smaller non-zero temperatures to this, because logits divided by less overflow."""
_MAX_BIAS = 100.0


@dataclass(frozen=True)
class ParameterLimits:
    """What one request may ask for."""

    max_tokens: int = _INT32_MAX
    """Greatest `max_tokens`: the model's context length."""
    max_stop_strings: int = 32
    """Stop strings of one request."""
    max_stop_chars: int = 512
    """Characters of one stop string or bad word."""
    max_bad_words: int = 128
    """Bad words of one request."""
    max_token_ids: int = 1024
    """Entries of `stop_token_ids` and of `logit_bias`."""
    max_logprobs: int = 20
    """Greatest `logprobs` and `prompt_logprobs`, as in vLLM."""
    max_outputs: int = 1
    """Greatest `n`: as many requests as the engine runs together."""
    vocab_size: int = _INT32_MAX
    """Token ids are below this."""
    max_json_bytes: int = 1 << 18
    """UTF-8 bytes of the whole JSON text."""


_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "best_of": (None, 1),
    "detokenize": (True,),
    "early_stopping": (False,),
    "extra_args": (None, {}),
    "flat_logprobs": (False,),
    "length_penalty": (1.0,),
    "logits_processors": (None, ()),
    "logprob_token_ids": (None, ()),
    "output_kind": (0,),
    "repetition_detection": (None,),
    "routed_experts_prompt_start": (0,),
    "skip_clone": (False,),
    "skip_reading_prefix_cache": (None, False),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (None,),
    "truncate_prompt_tokens": (None, -1),
    "use_beam_search": (False,),
}
"""Keys that vLLM knows and we do not serve, with the values that ask for nothing."""


def parse_sampling_parameters(source: Mapping[str, Any] | str, limits: ParameterLimits | None = None) -> SamplingParams:
    """Turn a mapping or a JSON text into validated `SamplingParams`.

    A null value counts as not given. `temperature` above 0 and under 0.01 is raised to 0.01, as in vLLM.

    Raises:
        RequestError: malformed JSON, not an object, an unknown key, a wrong type, a NaN or infinity, or a
            value out of range; the text names the field and the limit.
    """
    limits = limits or ParameterLimits()
    values = with_current_names(_parse_json(source, limits) if isinstance(source, str) else source)
    readers = _readers(limits)
    fields: dict[str, Any] = {}
    for key, value in values.items():
        if key in readers:
            if value is not None:
                fields[key] = readers[key](key, value)
        elif key == "lora_name":
            raise RequestError(key, "LoRA feature is not enabled.")
        elif key in _UNSUPPORTED:
            _require_default(key, value)
        else:
            raise RequestError(printable(key), f"unknown sampling parameter; known are: {', '.join(sorted(readers))}.")
    params = SamplingParams(**fields)
    if params.n > 1 and params.temperature == 0.0:
        raise RequestError("n", f"must be 1 with greedy sampling (temperature 0), but is {params.n}.")
    if params.min_tokens > params.max_tokens != TO_THE_END:
        raise RequestError(
            "min_tokens", f"must be at most max_tokens, which is {params.max_tokens}, but is {params.min_tokens}."
        )
    return params


def _readers(limits: ParameterLimits) -> dict[str, Callable[[str, Any], Any]]:
    return {
        "n": lambda key, value: read_integer(key, value, 1, limits.max_outputs),
        "max_tokens": lambda key, value: _max_tokens(key, value, limits),
        "min_tokens": lambda key, value: read_integer(key, value, 0, limits.max_tokens),
        "temperature": _temperature,
        "top_p": _top_p,
        "top_k": lambda key, value: max(0, read_integer(key, value, -1, _INT32_MAX)),
        "seed": _seed,
        "stop": lambda key, value: stop_strings(value, limits),
        "min_p": lambda key, value: read_number_between(key, value, 0, 1),
        "presence_penalty": lambda key, value: read_number_between(key, value, -2, 2),
        "frequency_penalty": lambda key, value: read_number_between(key, value, -2, 2),
        "repetition_penalty": _repetition_penalty,
        "logit_bias": lambda key, value: _logit_bias(key, value, limits),
        "stop_token_ids": lambda key, value: read_token_ids(key, value, limits.max_token_ids, limits.vocab_size),
        "bad_words": lambda key, value: _bad_words(key, value, limits),
        "logprobs": lambda key, value: read_integer(key, value, 0, limits.max_logprobs),
        "prompt_logprobs": lambda key, value: read_integer(key, value, 0, limits.max_logprobs),
        "structured_outputs": structured_outputs,
        "ignore_eos": read_boolean,
        "include_stop_str_in_output": read_boolean,
        "skip_special_tokens": read_boolean,
    }


def within_context(sampling: SamplingParams, prompt_tokens: int, max_model_len: int) -> SamplingParams:
    """The same parameters with a number for `TO_THE_END`; at least 1, so that a full context is still complained of."""
    if sampling.max_tokens != TO_THE_END:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=max(1, max_model_len - prompt_tokens))


def stop_strings(value: Any, limits: ParameterLimits | None = None) -> tuple[str, ...]:
    """Stop strings from one string or a list of them.

    Raises:
        RequestError: not a string or list of strings, an empty one, too many, too long, or not valid Unicode.
    """
    limits = limits or ParameterLimits()
    return read_strings("stop", value, limits.max_stop_strings, limits.max_stop_chars)


def _parse_json(text: str, limits: ParameterLimits) -> Mapping[str, Any]:
    if len(text) > limits.max_json_bytes or len(text.encode("utf-8", "surrogatepass")) > limits.max_json_bytes:
        raise RequestError(PARAMETERS_FIELD, f"the JSON text may have at most {limits.max_json_bytes} bytes.")
    if not text.strip():
        return {}
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except RequestError:
        raise
    except json.JSONDecodeError as error:
        raise RequestError(PARAMETERS_FIELD, f"not valid JSON: {error.msg} at character {error.pos}.") from None
    except (ValueError, RecursionError):
        raise RequestError(PARAMETERS_FIELD, "not valid JSON: a number is too long or the nesting too deep.") from None
    if not isinstance(values, dict):
        raise RequestError(PARAMETERS_FIELD, f"must be a JSON object, but is {json_type(values)}.")
    return values


def _refuse_constant(name: str) -> Any:
    raise RequestError(PARAMETERS_FIELD, f"{name} is not a number that JSON allows.")


def _max_tokens(key: str, value: Any, limits: ParameterLimits) -> int:
    if value in (TO_THE_END, str(TO_THE_END)):
        return TO_THE_END
    return read_integer(key, value, 1, limits.max_tokens)


def _temperature(key: str, value: Any) -> float:
    number = read_number(key, value)
    if not 0.0 <= number <= 100.0:
        raise RequestError(key, f"must be between 0 and 100, but is {shown(value)}.")
    return max(number, _MIN_TEMPERATURE) if number > 0.0 else 0.0


def _top_p(key: str, value: Any) -> float:
    number = read_number(key, value)
    if not 0.0 < number <= 1.0:
        raise RequestError(key, f"must be above 0 and at most 1, but is {shown(value)}.")
    return number


def _repetition_penalty(key: str, value: Any) -> float:
    number = read_number(key, value)
    if number <= 0.0:
        raise RequestError(key, f"must be above 0, but is {shown(value)}.")
    return number


def _logit_bias(key: str, value: Any, limits: ParameterLimits) -> tuple[tuple[int, float], ...]:
    """Token ids (as JSON must write them: strings) to biases, which are clamped to -100..100, as in vLLM."""
    pairs = read_nested(key, value)
    if not isinstance(pairs, Mapping):
        raise RequestError(key, "must be an object from token ids to numbers.")
    if len(pairs) > limits.max_token_ids:
        raise RequestError(key, f"at most {limits.max_token_ids} tokens, but there are {len(pairs)}.")
    return tuple(
        (read_integer(key, token, 0, limits.vocab_size - 1), min(_MAX_BIAS, max(-_MAX_BIAS, read_number(key, bias))))
        for token, bias in pairs.items()
    )


def _bad_words(key: str, value: Any, limits: ParameterLimits) -> tuple[str, ...]:
    """One word, a list of them, or the list's JSON text; vLLM has the lists only."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = read_nested(key, value)
        except RequestError:
            said = (
                "a string that begins with '[' must be the JSON text of a list; give a word that begins so in a list."
            )
            raise RequestError(key, said) from None
    return read_strings(key, value, limits.max_bad_words, limits.max_stop_chars)


def _seed(key: str, value: Any) -> int | None:
    number = read_integer(key, value, -1, _INT64_MAX)
    return None if number == -1 else number


def _require_default(key: str, value: Any) -> None:
    allowed = _UNSUPPORTED[key]
    default = next((item for item in allowed if item is not None), None)
    if value is None or any(_equal(item, value) for item in allowed):
        return
    if isinstance(value, str) and default is not None and not isinstance(default, (tuple, dict)):
        try:
            read = read_boolean if isinstance(default, bool) else read_number
            same = read(key, value) == default
        except RequestError:
            same = False
        if same:
            return
    shown = "null" if default is None else json.dumps(default)
    raise RequestError(key, f"not supported yet: only its default, {shown}, is served.")


def _equal(allowed: Any, value: Any) -> bool:
    if isinstance(allowed, tuple):
        return isinstance(value, (list, tuple)) and not value
    if isinstance(allowed, bool) or isinstance(value, bool):
        return allowed is value
    return bool(allowed == value)
