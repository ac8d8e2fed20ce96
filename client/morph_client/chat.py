"""A conversation: what was said, and which part of it still goes to the model. Knows no terminal and no server."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from morph_client.errors import InvalidRequest

# How servers name their context when they refuse a prompt: this one's two sentences, then vLLM's.
_CONTEXT = re.compile(
    r"exceed the context of (?P<context>\d+) tokens"
    r"|the model takes at most (?P<prompt>\d+)"
    r"|maximum (?:context|model) length (?:is|of) (?P<vllm>\d+)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Turn:
    """One question and the model's answer."""

    question: str
    answer: str
    interrupted: bool = False
    """The answer was broken off by the user: ``answer`` is what had come by then."""


class PromptFormat(ABC):
    """Turns a conversation into the one text that the server completes.

    Implementations do no I/O after construction. Tokens are counted as the server counts them, special tokens
    that it adds included.
    """

    @property
    @abstractmethod
    def context(self) -> int | None:
        """Most tokens of prompt and answer together, as far as known without the server; ``None`` if not."""

    @property
    @abstractmethod
    def takes_empty(self) -> bool:
        """Whether an empty question means something."""

    @abstractmethod
    def prompt(self, system: str, turns: Sequence[Turn], question: str) -> str:
        """The text to send, so that what the model adds to it is the answer to ``question``.

        ``system`` may be empty; ``turns`` are the earlier ones, oldest first. Raises :class:`BadInput` for a
        conversation that cannot be put in this form (a model without a system role, say).
        """

    @abstractmethod
    def count(self, prompt: str) -> int | None:
        """The prompt's length in tokens; ``None`` if it cannot be known here."""


class RawText(PromptFormat):
    """Plain text that the model continues, turn after turn: for models that were not made for chat.

    Pieces are joined by one space, unless there is white space already. An empty question says: go on.
    """

    @property
    def context(self) -> int | None:
        """Not known: the server says so when the text has become too long."""
        return None

    @property
    def takes_empty(self) -> bool:
        """To go on."""
        return True

    def prompt(self, system: str, turns: Sequence[Turn], question: str) -> str:
        """All pieces, in order."""
        text = system
        for turn in turns:
            # The answer came as the continuation of its question, so it brings its own space, if any.
            text = _joined(text, turn.question) + turn.answer
        return _joined(text, question)

    def count(self, prompt: str) -> int | None:
        """Not known without a tokenizer."""
        return None


class Conversation:
    """The turns so far. All are kept for the record; the first ``forgotten`` are no longer sent."""

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.forgotten = 0
        self._turns: list[Turn] = []

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The whole record, oldest first."""
        return tuple(self._turns)

    @property
    def sent(self) -> tuple[Turn, ...]:
        """The turns that go to the model with the next question."""
        return tuple(self._turns[self.forgotten :])

    def add(self, turn: Turn) -> None:
        """Appends a turn."""
        self._turns.append(turn)

    def forget(self, turns: int) -> None:
        """Leaves the ``turns`` oldest turns that are still sent out of what is sent."""
        self.forgotten = min(len(self._turns), self.forgotten + turns)

    def reset(self) -> None:
        """Forgets and deletes every turn; the system text stays."""
        self._turns.clear()
        self.forgotten = 0

    def messages(self) -> list[dict[str, object]]:
        """The record as chat messages; an answer that was broken off has ``"interrupted": true``."""
        found: list[dict[str, object]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self._turns:
            found.append({"role": "user", "content": turn.question})
            mark = {"interrupted": True} if turn.interrupted else {}
            found.append({"role": "assistant", "content": turn.answer, **mark})
        return found

    def fitting_prompt(self, form: PromptFormat, question: str, context: int | None, max_tokens: int) -> str:
        """The prompt for ``question``, after forgetting as many of the oldest turns as its length asks for.

        ``context`` and ``max_tokens`` are in tokens; with no context known, nothing is forgotten. The question
        itself always stays: if even that is too long, the server refuses it in its own words.
        """
        while True:
            prompt = form.prompt(self.system, self.sent, question)
            if context is None or not self.sent:
                return prompt
            tokens = form.count(prompt)
            if tokens is None or tokens + max_tokens <= context:
                return prompt
            self.forget(1)


def context_named_in(refusal: InvalidRequest) -> int | None:
    """The context in tokens that a server named when it refused a prompt as too long; ``None`` for another refusal."""
    found = _CONTEXT.search(str(refusal))
    if found is None:
        return None
    # A limit on the prompt alone leaves room for one token of output.
    return int(found["prompt"]) + 1 if found["prompt"] else int(found["context"] or found["vllm"])


def _joined(left: str, right: str) -> str:
    if not left or not right or left[-1].isspace() or right[0].isspace():
        return left + right
    return f"{left} {right}"
