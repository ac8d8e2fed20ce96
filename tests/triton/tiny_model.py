"""A model folder without weights: a config.json and a byte-level tokenizer, enough for everything but the engine."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|end|>"
EOS_ID = 0
CORPUS = ["hello world, the quick brown fox jumps over the lazy dog. " * 4, "naïve café ☃ 😀 " * 4]


def tiny_tokenizer(vocab_size: int = 320) -> Tokenizer:
    """A byte-level BPE that can spell any text; `<|end|>` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_tiny_model(folder: Path) -> Path:
    """Make `folder` a model folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
