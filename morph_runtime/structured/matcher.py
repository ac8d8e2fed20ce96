"""One request's place in its grammar."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher

COMPLAINT_CHARS = 200


class GrammarMatcher:
    """Follows the output of one request. Only ever advanced: a preemption keeps the tokens, so it keeps this too.

    Attributes:
        inner: the library's matcher.
    """

    def __init__(self, inner: LLMatcher) -> None:
        self.inner = inner
        self._consumed = 0

    def advance(self, tokens: Sequence[int], prompt_len: int) -> None:
        """Take the output tokens that came since the last call (the whole sequence is given, prompt first)."""
        fresh = tokens[prompt_len + self._consumed :]
        if fresh:
            self.inner.consume_tokens(list(fresh))
            self._consumed += len(fresh)

    @property
    def error(self) -> str:
        """Why the grammar can go no further (a limit of the library was passed), in one sentence; empty if it can."""
        return "" if not self.inner.is_error() else f"structured_outputs: {complaint(self.inner.get_error())}."


def complaint(text: str) -> str:
    """The point of one of the library's error messages, which may show the grammar on several lines."""
    if "NoExtension" in text:
        return "nothing can match it"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["the grammar library gives no reason"]
    marked = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    short = (marked or lines)[0].rstrip(".")
    return short if len(short) <= COMPLAINT_CHARS else short[:COMPLAINT_CHARS] + "…"
