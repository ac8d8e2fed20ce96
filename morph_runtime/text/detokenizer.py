"""Tokens to text, as they come, never half a character.

What is returned for a token depends on the tokens before it alone, never on how they arrived in
groups: streaming and non-streaming requests get the same text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from morph_runtime.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How a vocabulary with byte fallback spells a byte."""
_HELD_TOKENS_MAX = 8
"""A character has at most 4 bytes, so after this many tokens a U+FFFD is what the model wrote."""
_PROMPT_TOKENS, _PROMPT_TOKENS_MAX = 4, 24
"""Tokens at the prompt's end that are decoded before the first token: so many, or more if they are no whole text."""


class Detokenizer(Protocol):
    """Turns one request's tokens into text."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """The rest; an incomplete character becomes U+FFFD, as in vLLM."""
        ...


def make_detokenizer(
    tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
) -> Detokenizer:
    """The detokenizer that suits the tokenizer's decoder, for what follows the tokens `prompt`."""
    if tokenizer.decoder_type == "ByteLevel":
        return ByteLevelDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return WindowDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens, prompt=prompt)


class ByteLevelDetokenizer:
    """For byte-level BPE (GPT-2, Llama 3, Qwen): tokens are bytes, UTF-8 does the rest.

    Exact: the deltas joined are the decoder's text of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, tokens: Sequence[int]) -> str:
        """See `Detokenizer`."""
        if not self._skipped.isdisjoint(tokens):
            tokens = [token for token in tokens if token not in self._skipped]
        return self._utf8.decode(b"".join(map(self._bytes_of.__getitem__, tokens)))

    def flush(self) -> str:
        """See `Detokenizer`."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For any decoder (SentencePiece with byte fallback, WordPiece, ...): decode a short window again per token.

    The window starts with the tokens whose text was returned last, because a decoder may treat
    the first token differently (SentencePiece strips its space). Before the first token these are the prompt's last
    ones, so that text and prompt fit together.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        """`prompt`: what goes before; empty: the text begins here."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._context_text = ""
        for count in range(_PROMPT_TOKENS, _PROMPT_TOKENS_MAX + 1):
            self._context = list(prompt[-count:])
            self._context_text = self._decode(self._context)
            whole = self._context_text and _REPLACEMENT not in self._context_text[:1] + self._context_text[-1:]
            if whole or count >= len(prompt):
                break
        self._held: list[int] = []
        self._byte_run = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, tokens: Sequence[int]) -> str:
        """See `Detokenizer`."""
        return "".join([self._push(token) for token in tokens])

    def _push(self, token: int) -> str:
        self._held.append(token)
        text = self._decode(self._context + self._held)
        incomplete = self._is_incomplete(token, text)
        if incomplete or text == self._context_text:
            if not incomplete and len(self._held) >= _HELD_TOKENS_MAX:
                self._held = self._held[-1:]  # tokens without text (skipped special ones): no need to keep them all
            return ""
        return self._release(text)

    def flush(self) -> str:
        """See `Detokenizer`."""
        return self._release(self._decode(self._context + self._held)) if self._held else ""

    def _is_incomplete(self, token: int, text: str) -> bool:
        """Whether the text so far ends within a character."""
        byte = _BYTE_TOKEN.fullmatch(self._tokenizer.backend.id_to_token(token) or "")
        if byte is not None:
            self._byte_run.decode(bytes([int(byte.group(1), 16)]))
            return bool(self._byte_run.getstate()[0])
        self._byte_run.reset()
        return text.endswith(_REPLACEMENT) and len(self._held) < _HELD_TOKENS_MAX

    def _release(self, text: str) -> str:
        if text.startswith(self._context_text):
            delta = text[len(self._context_text) :]
        else:  # the decoder rewrote what is out already (a byte run that turned invalid): go on behind it
            delta = self._decode(self._held)
        self._context, self._held = self._held, []
        self._context_text = self._decode(self._context)
        return delta

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
