"""What differs between decoder families, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """Names and habits of one architecture; `{}` in a name stands for the layer number."""

    name: str
    qkv: tuple[str, str, str] = (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    )
    """Modules of the query, key and value projections."""
    o: str = "model.layers.{}.self_attn.o_proj"
    gate_up: tuple[str, str] = ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj")
    down: str = "model.layers.{}.mlp.down_proj"
    input_norm: str = "model.layers.{}.input_layernorm.weight"
    post_norm: str = "model.layers.{}.post_attention_layernorm.weight"
    qk_norm: tuple[str, str] | None = None
    """RMS norms over each head's queries and keys, before the rotation; None: the family has none."""
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    qkv_bias: bool | None = False
    """Whether q, k and v have a bias; None: as `attention_bias` in config.json says."""
    o_bias: bool | None = False
    """Whether the attention's output projection has one; None as above."""
    mlp_bias: bool | None = False
    """Whether the MLP's linears have one; None: as `mlp_bias` says."""
    window_switch: str = ""
    """Field of config.json that turns `sliding_window` on; empty: it is on unless it is null."""
    window: int = 0
    """Tokens of the sliding window where config.json has no `sliding_window`; 0: that field is not read at all."""
    head_dim: int = 0
    """Size of a head where config.json gives none; 0: hidden size / heads."""
    max_positions: int = 2048
    """Tokens of context where config.json gives none."""


LLAMA = Family(name="llama", qkv_bias=None, o_bias=None, mlp_bias=None)
MISTRAL = Family(name="mistral", window=4096, max_positions=131072)
QWEN2 = Family(name="qwen2", qkv_bias=True, window=4096, window_switch="use_sliding_window", max_positions=32768)
QWEN3 = replace(
    QWEN2,
    name="qwen3",
    qkv_bias=None,
    o_bias=None,
    qk_norm=("model.layers.{}.self_attn.q_norm.weight", "model.layers.{}.self_attn.k_norm.weight"),
    head_dim=128,
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}
"""Architecture, as config.json names it, to family. CodeLlama and Vicuna call themselves Llama."""
