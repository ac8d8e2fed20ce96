"""Bad words as the token sequences that spell them."""

from __future__ import annotations

import msgspec

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.text.tokenizer import Tokenizer


def with_bad_word_ids(sampling: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The parameters with `bad_word_ids` filled in.

    As in vLLM, a word is spelt as at the start of a text and, where that is as many tokens and begins
    with another one, as after a space. Other spellings of the same letters are not found.
    """
    if not sampling.bad_words:
        return sampling
    spelt: list[tuple[int, ...]] = []
    for word in sampling.bad_words:
        bare = tokenizer.encode_plain(word.lstrip(" "))
        spaced = tokenizer.encode_plain(" " + word.lstrip(" "))
        if bare:
            spelt.append(bare)
        if spaced and (not bare or (len(spaced) == len(bare) and spaced[0] != bare[0])):
            spelt.append(spaced)
    return msgspec.structs.replace(sampling, bad_word_ids=tuple(spelt))
