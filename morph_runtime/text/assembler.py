"""One request's output text: detokenize, watch for stop strings, count tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.text.detokenizer import make_detokenizer
from morph_runtime.text.stops import StopMatcher
from morph_runtime.text.tokenizer import Tokenizer


class TextDelta(msgspec.Struct, frozen=True):
    """New text of one request.

    Attributes:
        text: what to append; may be empty.
        n_tokens: how many of the pushed tokens count (those after a stop string do not).
        finish_reason: `stop` once a stop string is complete, else None.
    """

    text: str
    n_tokens: int
    finish_reason: str | None = None


class OutputAssembler:
    """Turns the tokens of one request into its text, the same for every way of grouping them.

    Not safe for use from several threads at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        eos_token_ids: Iterable[int] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        """`prompt`: the tokens that the output follows."""
        self._detokenizer = make_detokenizer(tokenizer, skip_special_tokens=sampling.skip_special_tokens, prompt=prompt)
        self._matcher = StopMatcher(sampling.stop, include_stop=sampling.include_stop_str_in_output)
        self._min_tokens = sampling.min_tokens
        # The token that ends the sequence counts but is no text, even when special tokens are shown (as in vLLM).
        eos, structured = frozenset(eos_token_ids), sampling.structured_outputs is not None
        ends = eos.union(sampling.stop_token_ids) if structured or not sampling.ignore_eos else sampling.stop_token_ids
        self._silent = frozenset() if sampling.include_stop_str_in_output else frozenset(ends)
        self._at_once = eos if structured else frozenset()  # these end a grammar's output even before `min_tokens`
        self._count = 0

    @property
    def n_tokens(self) -> int:
        """Tokens that count so far."""
        return self._count

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the output."""
        return self._matcher.stopped

    def push(self, tokens: Sequence[int]) -> TextDelta:
        """Take the next tokens. After a stop string they count no more."""
        if not self._matcher.watches and self._silent.isdisjoint(tokens):
            self._count += len(tokens)
            return TextDelta(self._detokenizer.push(tokens), len(tokens))
        parts: list[str] = []
        taken = 0
        for token in tokens:
            if self._matcher.stopped:
                break
            taken += 1
            self._count += 1
            ends = token in self._silent and (self._count >= self._min_tokens or token in self._at_once)
            text = "" if ends else self._detokenizer.push([token])
            parts.append(self._matcher.feed(text, armed=self._count > self._min_tokens))
        return TextDelta("".join(parts), taken, "stop" if self._matcher.stopped else None)

    def flush(self) -> TextDelta:
        """The rest of the text, once the last token was pushed."""
        ended = self._matcher.stopped
        if ended:
            return TextDelta("", 0, "stop")
        text = self._matcher.feed(self._detokenizer.flush(), armed=self._count > self._min_tokens)
        if not self._matcher.stopped:
            text += self._matcher.flush()
        return TextDelta(text, 0, "stop" if self._matcher.stopped else None)
