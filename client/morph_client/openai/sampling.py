"""From a request's body to the sampling parameters of the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph_client.openai.problems import ApiError
from morph_client.openai.shapes import ChatRequest, GenerationRequest, ResponseFormat, TextRequest
from morph_client.types import SamplingParams

SEEDS = 2**63
_AS_THEY_ARE = ("logit_bias", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""Parameters that the server takes under the same names."""
TO_THE_END = -1
"""``max_tokens`` for "until the context is full": OpenAI's default in a chat."""


def sampling_of(request: ChatRequest | TextRequest, choice: int) -> SamplingParams:
    """What answer number ``choice`` (0-based) to one prompt is asked for with.

    With a seed each answer has a seed of its own, so that they differ and yet come again.
    """
    max_tokens: int | None
    if isinstance(request, ChatRequest):
        given = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        max_tokens = TO_THE_END if given is None else _positive("max_tokens", given)
        logprobs = _chat_logprobs(request)
    else:
        max_tokens = None if request.max_tokens is None else _positive("max_tokens", request.max_tokens)
        logprobs = request.logprobs
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=_seed_of(request.seed, choice),
        stop=request.stop if request.stop else None,
        ignore_eos=request.ignore_eos,
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        bad_words=request.bad_words,
        stop_token_ids=request.stop_token_ids,
        logprobs=logprobs,
        structured_outputs=_structured(request),
        extra={name: value for name in _AS_THEY_ARE if (value := getattr(request, name)) is not None},
    )


def _seed_of(seed: int | None, choice: int) -> int | None:
    """The seed of an answer; the first has the one that was given, -1 means none, and beyond the largest comes 0."""
    if seed is None or seed == -1 or choice == 0:
        return seed
    return (seed + choice) % SEEDS


def _positive(name: str, value: int) -> int:
    """-1 has a meaning on the wire, and none in this interface."""
    if value < 1:
        raise ApiError(400, f"{name}: must be at least 1, but is {value}.", param=name)
    return value


def _chat_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs, which is not true.", param="top_logprobs")
    return None


def _structured(request: GenerationRequest) -> Mapping[str, object] | None:
    wanted = _form(request.response_format)
    if wanted is not None and request.structured_outputs is not None:
        raise ApiError(
            400, "response_format: cannot stand beside structured_outputs: leave one out.", param="response_format"
        )
    return request.structured_outputs if wanted is None else wanted


def _form(wanted: ResponseFormat | None) -> Mapping[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"json_object": True}
    schema = wanted.json_schema.form if wanted.json_schema is not None else None
    if schema is None:
        raise ApiError(400, "response_format: json_schema.schema is missing.", param="response_format")
    return {"json": schema}
