"""Output tensors of one response, as Triton's vLLM backend names and shapes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from morph_backend.inputs import Wants
from morph_backend.rungs import RUNGS
from morph_runtime.engine.messages import TokenLogprobs


@dataclass(frozen=True)
class ResponseContent:
    """What one response says.

    Attributes:
        text: the new text, or the whole one.
        finish_reason: None on all responses but the last.
        num_input_tokens: tokens of the prompt.
        num_cached_tokens: those of them that the prefix cache held.
        levels: the level of each token that is new in this response.
        rung_tokens: tokens of the request so far by rung, weighted by layer.
        logprobs: of each token that is new in this response; None if the sampling parameter `logprobs` is unset.
        cumulative_logprob: of all tokens of the request so far.
    """

    text: str
    finish_reason: str | None
    num_input_tokens: int
    levels: Sequence[int]
    rung_tokens: Sequence[float]
    logprobs: Sequence[TokenLogprobs] | None = None
    cumulative_logprob: float = 0.0
    num_cached_tokens: int = 0


def output_tensors(content: ResponseContent, wants: Wants, spelling: Callable[[int], str]) -> list[Any]:
    """The tensors of a response: the text and what was asked for. `spelling` gives one token's text."""
    tensors = [_string("text_output", content.text)]
    if wants.finish_reason:
        tensors.append(_string("finish_reason", str(content.finish_reason)))
    if wants.cumulative_logprob:
        tensors.append(pb_utils.Tensor("cumulative_logprob", np.asarray([content.cumulative_logprob], np.float32)))
    if wants.logprobs:
        tensors.append(_string("logprobs", json.dumps(logprob_dicts(content.logprobs, spelling))))
    if wants.num_input_tokens:
        tensors.append(pb_utils.Tensor("num_input_tokens", np.asarray(content.num_input_tokens, dtype=np.uint32)))
    if wants.num_output_tokens:
        tensors.append(pb_utils.Tensor("num_output_tokens", np.asarray([len(content.levels)], dtype=np.uint32)))
    if wants.num_cached_tokens:
        tensors.append(pb_utils.Tensor("num_cached_tokens", np.asarray([content.num_cached_tokens], dtype=np.uint32)))
    if wants.morph_level:
        tensors.append(pb_utils.Tensor("morph_level", np.asarray(content.levels, dtype=np.int32)))
    if wants.rung_share:
        tensors.append(_string("rung_share", json.dumps(rung_share(content.rung_tokens))))
    return tensors


def logprob_dicts(
    logprobs: Sequence[TokenLogprobs] | None, spelling: Callable[[int], str]
) -> list[dict[int, dict[str, Any]]] | None:
    """One dictionary per token: the chosen token first, then the most likely ones in order, as vLLM has them."""
    if logprobs is None:
        return None
    return [
        {
            token: {"logprob": value, "rank": rank, "decoded_token": spelling(token)}
            for token, value, rank in zip(at.ids, at.values, (at.rank, *range(1, len(at.ids))), strict=True)
        }
        for at in logprobs
    ]


def rung_share(rung_tokens: Sequence[float]) -> dict[str, float]:
    """Shares by rung that sum to 1; all full precision before the first token."""
    total = sum(rung_tokens)
    if total <= 0:
        return {"full": 1.0, "w8": 0.0, "w4": 0.0}
    return {rung: round(tokens / total, 9) for rung, tokens in zip(RUNGS, rung_tokens, strict=True)}


def _string(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.asarray([text.encode("utf-8", "replace")], dtype=np.object_))
