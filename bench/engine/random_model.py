"""Folders of models that have real shapes and no weights: serve them with `model.load_format: dummy`."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "head_dim": 128,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, object]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192,
        "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "llama-2-7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "codellama-34b": {
        "hidden_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 22016, "vocab_size": 32000, "rope_theta": 1000000.0, "max_position_embeddings": 16384,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "tiny": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 512, "vocab_size": 1024, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
"""Real ones, and `tiny` to try a benchmark out on a CPU."""


def word(token: int) -> str:
    """How the tokenizer of `write_folder` spells a token."""
    return f"w{token}"


def write_folder(shape: str, folder: Path) -> Path:
    """A folder with the config.json of a shape and a tokenizer of one word per token."""
    config = {**COMMON, **SHAPES[shape]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    size = config["vocab_size"]
    assert isinstance(size, int)
    tokenizer = Tokenizer(models.WordLevel({word(token): token for token in range(size)}, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
