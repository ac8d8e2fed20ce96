"""Which tokens end a sequence: all that config.json, generation_config.json and the tokenizer's files name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from morph_runtime.errors import ConfigError
from morph_runtime.weights.jsonfile import Fields, read_json


def read_end_tokens(config: Fields, folder: Path, vocab: int) -> tuple[int, ...]:
    """Numbers below `vocab`, each once; may be empty.

    None of the files goes before another: a fine-tune for chat often gives its tokenizer another end, and keeps the
    configs of its base. A tokenizer may have tokens beyond the model's vocabulary: such an end is left out.

    Args:
        config: of config.json.
        folder: that the files lie in; all but config.json may be missing.
        vocab: columns of the model's logits.

    Raises:
        ConfigError: a file that cannot be read, or a bad field, named; a number from `vocab` on in a config is one.
    """
    found = _numbers(config.get("eos_token_id"), vocab, f"{folder / 'config.json'}: 'eos_token_id'")
    generation = folder / "generation_config.json"
    if generation.is_file():
        found += _numbers(read_json(generation).get("eos_token_id"), vocab, f"{generation}: 'eos_token_id'")
    text, tokenizer = _end_text(folder / "tokenizer_config.json"), folder / "tokenizer.json"
    if text is not None and tokenizer.is_file():
        known = _numbers(_number_of(text, tokenizer), 2**31, f"{tokenizer}: the number of {text!r}")
        found += [token for token in known if token < vocab]
    return tuple(dict.fromkeys(found))


def _numbers(value: Any, limit: int, what: str) -> list[int]:
    """A number below `limit`, several, or none (null)."""
    tokens = [] if value is None else value if isinstance(value, list) else [value]
    for token in tokens:
        if type(token) is not int or not 0 <= token < limit:
            raise ConfigError(f"{what} must hold token numbers from 0 to {limit - 1}, but holds {token!r}.")
    return list(tokens)


def _end_text(path: Path) -> str | None:
    """`eos_token` of a tokenizer_config.json, as text; None if there is none."""
    given = read_json(path).get("eos_token") if path.is_file() else None
    text = given.get("content") if isinstance(given, dict) else given
    if given is not None and not isinstance(text, str):
        raise ConfigError(f"{path}: 'eos_token' must be a string or an object with 'content', but is {given!r}.")
    return text


def _number_of(text: str, path: Path) -> Any:
    """What a tokenizer.json gives for a token, unchecked; None if it does not know it.

    Added tokens go before the vocabulary, as in the `tokenizers` library. A vocabulary maps texts to numbers, or lists
    pairs of text and score by number (Unigram).
    """
    fields = Fields(read_json(path), str(path))
    added = fields.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("content") == text:
            return token.get("id")
    vocab = (fields.section("model") or {}).get("vocab")
    if isinstance(vocab, dict):
        return vocab.get(text)
    pairs = enumerate(vocab if isinstance(vocab, list) else ())
    return next((number for number, pair in pairs if isinstance(pair, list) and pair[:1] == [text]), None)
