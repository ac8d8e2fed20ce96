"""The bodies of answers: whole ones and the events of a stream, for either endpoint. Knows no HTTP."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from morph_client.types import TokenLogprob

Scores = Sequence[Sequence[TokenLogprob]]
_USAGE_LATER = '],"usage":null}'
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass
class Choice:
    """One answer, as far as it has come."""

    index: int
    prompt: int
    """Which of the request's prompts it answers."""
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[Sequence[TokenLogprob]] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens of all answers; each prompt counts once."""
    prompts = {choice.prompt: choice.prompt_tokens for choice in choices}
    prompt, completion = sum(prompts.values()), sum(choice.tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Answer(ABC):
    """The form of one request's answer."""

    def __init__(self, model: str, top: int | None) -> None:
        """``top`` is how many likely tokens of each position are shown; ``None``: no log probabilities at all."""
        self._top = top
        self._model = model
        self._id = f"{self._prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._opening = ""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer in one piece."""
        return {**self._head(self._whole), "choices": [self._choice(c) for c in choices], "usage": usage(choices)}

    def event(self, choice: Choice, text: str, logprobs: Scores, first: bool, with_usage: bool) -> str:
        """New text of one answer, as JSON. ``first`` is its first event; ``with_usage`` if the usage ends the stream.

        There is one for each token of each stream, so what they have in common is encoded once.
        """
        if not self._opening:
            self._opening = _ENCODER.encode({**self._head(self._part), "choices": []})[:-2]
        news = _ENCODER.encode(self._news(choice, text, logprobs, first))
        return f"{self._opening}{news}{_USAGE_LATER if with_usage else ']}'}"

    def last_event(self, choices: Sequence[Choice]) -> str:
        """The usage, at a stream's end, as JSON."""
        return _ENCODER.encode({**self._head(self._part), "choices": [], "usage": usage(choices)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    _prefix: str
    _whole: str
    _part: str

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def _news(self, choice: Choice, text: str, logprobs: Scores, first: bool) -> dict[str, Any]: ...


class ChatAnswer(Answer):
    """The answer of ``/v1/chat/completions``."""

    _prefix, _whole, _part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": self._scores(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _news(self, choice: Choice, text: str, logprobs: Scores, first: bool) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": {"role": "assistant", "content": text} if first else {"content": text},
            "logprobs": self._scores(logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _scores(self, logprobs: Scores) -> dict[str, Any] | None:
        if self._top is None:
            return None
        tops = [[_scored(token) for token in likely(at, self._top)] for at in logprobs]
        return {"content": [{**_scored(at[0]), "top_logprobs": top} for at, top in zip(logprobs, tops, strict=True)]}


class TextAnswer(Answer):
    """The answer of ``/v1/completions``; ``echo`` holds the prompts if they stand in front of the answers."""

    _prefix, _whole, _part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, top: int | None, echo: Sequence[str] | None = None) -> None:
        super().__init__(model, top)
        self._echo = echo

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return self._news(choice, choice.text, choice.logprobs, True)

    def _news(self, choice: Choice, text: str, logprobs: Scores, first: bool) -> dict[str, Any]:
        before = self._echo[choice.prompt] if self._echo and first else ""
        return {
            "index": choice.index,
            "text": before + text,
            "logprobs": self._scores(choice, text, logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _scores(self, choice: Choice, text: str, logprobs: Scores) -> dict[str, Any] | None:
        if self._top is None:
            return None
        offset = len(choice.text) - len(text) + (len(self._echo[choice.prompt]) if self._echo else 0)
        offsets = []
        for at in logprobs:
            offsets.append(offset)
            offset += len(at[0].text)
        return {
            "tokens": [at[0].text for at in logprobs],
            "token_logprobs": [at[0].logprob for at in logprobs],
            "top_logprobs": [{t.text: t.logprob for t in likely(at, self._top) or at[:1]} for at in logprobs],
            "text_offset": offsets,
        }


def likely(at: Sequence[TokenLogprob], count: int) -> list[TokenLogprob]:
    """The ``count`` most likely tokens of one position, best first; the wire puts the chosen token before them."""
    return sorted(at, key=lambda token: token.rank)[:count]


def _scored(token: TokenLogprob) -> Mapping[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}
