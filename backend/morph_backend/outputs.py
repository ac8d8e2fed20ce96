"""Output tensors of one response, as Triton's vLLM backend names and shapes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from morph_backend.inputs import Wants
from morph_backend.rungs import RUNGS
from morph_runtime.engine.messages import TokenLogprobs


class OutputNews(msgspec.Struct, frozen=True):
    """What one response says of one output.

    Attributes:
        text: the new text, or the whole one.
        finish_reason: None until the output has ended.
        levels: the level of each token that is new in this response.
        rung_tokens: tokens of the output so far by rung, weighted by layer.
        logprobs: of each token that is new in this response; None if the sampling parameter `logprobs` is unset.
        cumulative_logprob: of all tokens of the output so far.
        history: what was computed for it since the last response: (first position, end, level).
    """

    text: str
    finish_reason: str | None
    levels: Sequence[int]
    rung_tokens: Sequence[float]
    logprobs: Sequence[TokenLogprobs] | None = None
    cumulative_logprob: float = 0.0
    history: Sequence[tuple[int, int, int]] = ()


class ResponseContent(msgspec.Struct, frozen=True):
    """What one response says.

    Attributes:
        outputs: all outputs of the request, in order, with or without news.
        num_input_tokens: tokens of the prompt.
        num_cached_tokens: those of them that the prefix cache held.
        prompt_logprobs: of each token of the prompt but the first; None if they are not asked for, or were told.
        recomputed_at: how many tokens had come at each end of an engine so far.
        whole: whether it brings what is the same in most responses, if that was asked for.
    """

    outputs: Sequence[OutputNews]
    num_input_tokens: int
    num_cached_tokens: int = 0
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    recomputed_at: Sequence[int] = ()
    whole: bool = True


def output_tensors(content: ResponseContent, wants: Wants, spelling: Callable[[int], str]) -> list[Any]:
    """The tensors of a response: the text and what was asked for. `spelling` gives one token's text."""
    outputs = content.outputs
    tensors = [_strings("text_output", [o.text for o in outputs])]
    if wants.finish_reason and content.whole:
        tensors.append(_strings("finish_reason", [str(o.finish_reason) for o in outputs]))
    if wants.cumulative_logprob:
        tensors.append(_numbers("cumulative_logprob", [o.cumulative_logprob for o in outputs], np.float32))
    if wants.logprobs:
        scores = [json.dumps(logprob_dicts(o.logprobs, spelling)) for o in outputs]
        tensors.append(_strings("logprobs", scores))
    if wants.num_input_tokens and content.whole:
        tensors.append(_numbers("num_input_tokens", content.num_input_tokens, np.uint32))
    if wants.num_output_tokens:
        tensors.append(_numbers("num_output_tokens", [len(o.levels) for o in outputs], np.uint32))
    if wants.num_cached_tokens and content.whole:
        tensors.append(_numbers("num_cached_tokens", [content.num_cached_tokens], np.uint32))
    if wants.prompt_logprobs:
        told = logprob_dicts(content.prompt_logprobs, spelling)
        tensors.append(_strings("prompt_logprobs", [json.dumps(told if told is None else [None, *told])]))
    if wants.recomputed_at:
        tensors.append(_numbers("recomputed_at", list(content.recomputed_at), np.int32))
    if wants.level_history:
        tensors.append(_strings("level_history", [json.dumps(list(o.history)) for o in outputs]))
    if wants.morph_level:
        tensors.append(_numbers("morph_level", [level for o in outputs for level in o.levels], np.int32))
    if wants.rung_share:
        tensors.append(_strings("rung_share", [json.dumps(rung_share(o.rung_tokens)) for o in outputs]))
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


def sentence(text: str) -> Any:
    """A text to answer with where nothing was generated."""
    return _strings("text_output", [text])


def _strings(name: str, texts: Sequence[str]) -> Any:
    return pb_utils.Tensor(name, np.asarray([text.encode("utf-8", "replace") for text in texts], dtype=np.object_))


def _numbers(name: str, values: float | Sequence[float], dtype: type) -> Any:
    return pb_utils.Tensor(name, np.asarray(values, dtype=dtype))
