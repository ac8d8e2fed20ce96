from __future__ import annotations

import pytest

from morph_runtime.text.tokenizer import Tokenizer
from tiny_model import tiny_tokenizer


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(tiny_tokenizer())


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    """Llama 2's kind: spaces as ▁, unknown characters as bytes, the first space stripped, a BOS in front."""
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import decoders, models, normalizers, processors

    words = ["▁hello", "▁world", "hello", "▁", "a", "b", "c", "▁a", ".", "\n", "é"]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *words])
    }
    tokenizer = HfTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(tokenizer)
