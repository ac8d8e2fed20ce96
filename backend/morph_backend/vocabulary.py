"""Token ids against the model's vocabulary: a tokenizer may know tokens (added ones) that the model was not made for.

The engine indexes its tensors by token id, so an id beyond them would end it, and every request with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.errors import RequestError
from morph_runtime.text.bad_words import with_bad_word_ids
from morph_runtime.text.tokenizer import Tokenizer


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Check that the model has an embedding for each token.

    Raises:
        RequestError: it has not.
    """
    if (largest := max(prompt, default=0)) >= vocab_size:
        raise RequestError(
            "text_input", f"has the token {largest}, but the model's vocabulary ends at {vocab_size - 1}: leave it out."
        )


def spell_bad_words(sampling: SamplingParams, tokenizer: Tokenizer, vocab_size: int) -> SamplingParams:
    """Fill in `bad_word_ids`, without words that need a token which the model does not have: it cannot say them."""
    spelt = with_bad_word_ids(sampling, tokenizer)
    known = tuple(word for word in spelt.bad_word_ids if max(word, default=0) < vocab_size)
    return spelt if len(known) == len(spelt.bad_word_ids) else msgspec.structs.replace(spelt, bad_word_ids=known)
