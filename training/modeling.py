"""Building, regularizing and saving the model: an unmodified Hugging Face ``LlamaForCausalLM``."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import END_OF_TEXT
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging


def build_config(
    *,
    vocab_size: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    context: int,
    end_id: int,
) -> LlamaConfig:
    """Return a Llama configuration with tied embeddings and no biases; ``context`` is in tokens.

    Raises:
        ValueError: when a linear's input is no multiple of 128 (4-bit groups need it), or heads do not divide.
    """
    if hidden % heads or heads % kv_heads:
        raise ValueError(f"hidden {hidden}, heads {heads} and KV heads {kv_heads} do not divide")
    for name, size in (("hidden", hidden), ("intermediate", intermediate)):
        if size % 128:
            raise ValueError(f"{name} is {size}: it must be a multiple of 128, the group of the 4-bit format")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
        initializer_range=0.02,
    )


def build_model(config: LlamaConfig) -> LlamaForCausalLM:
    """Return a freshly initialised float32 model; outputs into the residual stream start smaller with depth."""
    model = LlamaForCausalLM(config)
    scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def load_model(folder: Path) -> LlamaForCausalLM:
    """Return the model of a folder written by :func:`save_folder`, in float32, to train it further."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Drop a share ``rate`` of the embedding's and every block's output while training; weights keep their names."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout {rate} is outside [0, 1)")
    if rate == 0:
        return

    def drop(module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


class NextTokenLoss(nn.Module):
    """Mean next-token cross entropy of a window; the unit that is compiled."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        """Wrap ``model``; its parameters stay its own."""
        super().__init__()
        self.model = model

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss in nats per token of ``rows`` (int64 ``[windows, seq_len + 1]``)."""
        hidden = self.model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden)
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return AdamW groups: matrices decay, norms do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def as_saved(model: LlamaForCausalLM, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """Return a copy of ``model`` as a user will load it: in ``dtype`` and in evaluation mode."""
    copied = copy.deepcopy(model).eval().to(dtype)
    for module in copied.modules():
        module._forward_hooks.clear()
    copied.config.dtype = dtype
    return copied


def save_folder(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, shard_mib: int) -> None:
    """Write ``model`` (already in its final dtype) and ``tokenizer`` as a Hugging Face folder.

    ``config.json`` uses the keys of transformers 4 (``torch_dtype``, ``rope_theta``), which every reader knows.
    Shards are at most ``shard_mib`` MiB.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("model*.safetensors*"):
        stale.unlink()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(out, max_shard_size=shard_mib * 2**20)
    for shard in out.glob("model*.safetensors"):
        shard.chmod(0o644)
    config_path = out / "config.json"
    config = json.loads(config_path.read_text())
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config["torch_dtype"] = config.pop("dtype", "bfloat16")
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    end_id = model.config.eos_token_id
    generation = {
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
