"""The bytes behind the tokens of a byte-level vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from tokenizers import Tokenizer as HfTokenizer


class TokenBytes(dict[int, bytes]):
    """Bytes by token, looked up in the vocabulary once for each token; a token outside it stands for nothing."""

    def __init__(self, backend: HfTokenizer) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token: int) -> bytes:
        text = self._backend.id_to_token(token)
        if text is None:
            return b""  # not kept: there is no end of such numbers
        alphabet = _byte_alphabet()
        try:
            raw = bytes([alphabet[char] for char in text])
        except KeyError:  # an added token, spelt as it is
            raw = text.encode("utf-8")
        self[token] = raw
        return raw


@functools.cache
def _byte_alphabet() -> Mapping[str, int]:
    """GPT-2's table: the character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
