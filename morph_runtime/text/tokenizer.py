"""Prompts to tokens: a `tokenizer.json` with the checks that every prompt passes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from morph_runtime.errors import ConfigError, RequestError
from morph_runtime.text.token_bytes import TokenBytes


class Tokenizer:
    """The tokenizer of one model folder. Safe to use from several threads.

    Attributes:
        backend: the `tokenizers.Tokenizer` itself.
        decoder_type: type of its decoder (`ByteLevel`, `Sequence`, ...), empty when there is none.
        max_token_chars: characters of the longest entry of the vocabulary.
        special_ids: tokens that are no text, such as the one that ends a sequence.
        bytes_of: the bytes of each token, if the vocabulary is a byte-level one.
    """

    def __init__(self, backend: HfTokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        decoder = json.loads(backend.to_str()).get("decoder") or {}
        self.decoder_type: str = decoder.get("type", "")
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.bytes_of = TokenBytes(backend)
        self.max_token_chars = max((len(token) for token in backend.get_vocab(with_added_tokens=True)), default=1)

    @staticmethod
    def from_folder(folder: Path) -> Tokenizer:
        """Read `tokenizer.json` of a model folder.

        Raises:
            ConfigError: the file is missing or is not a tokenizer.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"The model folder '{folder}' has no tokenizer.json: it must be a Hugging Face checkpoint."
            )
        try:
            return Tokenizer(HfTokenizer.from_file(str(path)))
        except Exception as error:
            raise ConfigError(f"'{path}' cannot be read as a tokenizer: {error}.") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer's post-processor adds (a BOS, for example).

        Runs without the GIL: `encode` of the library holds it, `encode_batch_fast` does not.
        """
        ids: list[int] = self.backend.encode_batch_fast([text])[0].ids
        return ids

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` alone, without special tokens around it."""
        return tuple(self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def spelling(self, token: int) -> str:
        """One token as text, special or not; a part of a character becomes U+FFFD."""
        return self.decode([token], skip_special_tokens=False)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `tokens`; ids outside the vocabulary count as empty."""
        text: str = self.backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def encode_prompt(self, text: str, max_prompt_tokens: int) -> list[int]:
        """Token ids of a prompt.

        A text that is too long whatever its tokens are is refused before it is tokenized.

        Raises:
            RequestError: the prompt is empty, is not valid Unicode, or has more than `max_prompt_tokens` tokens.
        """
        if not text:
            raise RequestError("text_input", "the prompt must not be empty.")
        limit = f"the model takes at most {max_prompt_tokens}"
        if len(text) > self.max_token_chars * max_prompt_tokens:
            raise RequestError("text_input", f"the prompt has {len(text)} characters, too many tokens: {limit}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError("text_input", "the prompt must be valid UTF-8.") from None
        tokens = self.encode(text)
        if not tokens:
            raise RequestError("text_input", "the prompt gives no tokens.")
        if len(tokens) > max_prompt_tokens:
            raise RequestError("text_input", f"the prompt has {len(tokens)} tokens, but {limit}.")
        return tokens


def decode_utf8(raw: bytes, field: str = "text_input") -> str:
    """Text of strict UTF-8 bytes.

    Raises:
        RequestError: they are not valid UTF-8; the text names the first bad byte's position.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(field, f"must be valid UTF-8 (byte {error.start} is not).") from None


def check_context(prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
    """Check that prompt and output fit the context together.

    Raises:
        RequestError: `prompt_tokens + max_tokens` is above `max_model_len`.
    """
    if prompt_tokens + max_tokens > max_model_len:
        raise RequestError(
            "max_tokens",
            f"must be at most {max_model_len - prompt_tokens} for this prompt: its {prompt_tokens} tokens and"
            f" max_tokens {max_tokens} exceed the context of {max_model_len} tokens.",
        )
