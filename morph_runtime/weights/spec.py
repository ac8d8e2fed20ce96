"""What a checkpoint's config.json says about the model, validated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.linear import LinearShape
from morph_runtime.kernels.rope import RopeSpec
from morph_runtime.weights.endtokens import read_end_tokens
from morph_runtime.weights.families import FAMILIES, Family
from morph_runtime.weights.jsonfile import Fields, read_json
from morph_runtime.weights.quantconfig import refuse_quantized, require_awq
from morph_runtime.weights.ropeconfig import read_rope
from morph_runtime.weights.windows import read_windows


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and constants of a decoder; sizes count elements."""

    architecture: str
    family: Family
    hidden: int
    layers: int
    heads: int
    """Query heads."""
    kv_heads: int
    head_dim: int
    ffn: int
    """Inner size of the MLP."""
    vocab: int
    norm_eps: float
    rope: RopeSpec
    max_positions: int
    """Tokens of context by the config; more may be asked for, up to `longest_context`."""
    tied_embeddings: bool
    """The output matrix is the embedding."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int, ...]
    """Tokens that each layer's queries see, their own included; 0: all of them."""
    eos_ids: tuple[int, ...]
    """Tokens that end a sequence (weights.endtokens). May be empty."""
    dtype: torch.dtype
    """Type that the checkpoint was saved in, as config.json says."""

    @property
    def linears(self) -> tuple[LinearShape, LinearShape, LinearShape, LinearShape]:
        """The linears of one layer, fused: qkv, o, gate_up, down."""
        queries = self.heads * self.head_dim
        return (
            LinearShape("qkv", queries + 2 * self.kv_heads * self.head_dim, self.hidden),
            LinearShape("o", self.hidden, queries),
            LinearShape("gate_up", 2 * self.ffn, self.hidden),
            LinearShape("down", self.hidden, self.ffn),
        )

    @property
    def longest_context(self) -> int:
        """Tokens of context that the rotary embedding is made for, at least `max_positions`.

        Some configs with a scaled embedding hold the length before scaling in `max_position_embeddings`, some that
        after it. So this is what may be asked for, and not what is served unasked.
        """
        scaled = {"linear": self.max_positions, "yarn": self.rope.original_max_positions}.get(self.rope.kind, 0)
        return max(self.max_positions, int(min(scaled * self.rope.factor, 2**31)))

    @property
    def equal_v_and_o(self) -> bool:
        """Whether v_proj and o_proj have equal shapes (multi-head attention): AWQ rescales V between them then."""
        return self.kv_heads == self.heads and self.heads * self.head_dim == self.hidden

    @staticmethod
    def from_folder(folder: Path | str, awq: bool = False) -> ModelSpec:
        """Read config.json of a Hugging Face checkpoint, and from the files beside it what ends a sequence.

        Args:
            folder: of the checkpoint.
            awq: whether it must be AWQ in a layout that is read, or must not be quantized.

        Raises:
            ConfigError: an architecture that is not served, quantization other than asked for, or a bad field, named.
        """
        path = Path(folder) / "config.json"
        values = read_json(path)
        config = Fields(values, str(path))
        architecture = _architecture(config, path)
        family = FAMILIES[architecture]
        (require_awq if awq else refuse_quantized)(config.section("quantization_config"), path)
        if config.get("hidden_act") not in (None, "silu"):
            raise ConfigError(f"{path}: 'hidden_act' must be 'silu', but is {config.get('hidden_act')!r}.")
        hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
        kv_heads = config.whole("num_key_value_heads", heads)
        if config.get("head_dim") is None and not family.head_dim and hidden % heads:
            raise ConfigError(f"{path}: 'hidden_size' ({hidden}) is not a multiple of 'num_attention_heads' ({heads}).")
        head_dim = config.whole("head_dim", family.head_dim or hidden // heads)
        if heads % kv_heads:
            raise ConfigError(
                f"{path}: 'num_attention_heads' ({heads}) is not a multiple of 'num_key_value_heads' ({kv_heads})."
            )
        if head_dim % 2:
            raise ConfigError(f"{path}: 'head_dim' ({head_dim}) must be even for the rotary embedding.")
        vocab = config.whole("vocab_size")
        max_positions = config.whole("max_position_embeddings", family.max_positions)
        layers = config.whole("num_hidden_layers", high=4096)
        attention_bias = config.flag("attention_bias", False)
        return ModelSpec(
            architecture=architecture,
            family=family,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=config.whole("intermediate_size"),
            vocab=vocab,
            norm_eps=config.number("rms_norm_eps", 1e-6),
            rope=read_rope(config, max_positions, str(path)),
            max_positions=max_positions,
            tied_embeddings=config.flag("tie_word_embeddings", False),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=config.flag("mlp_bias", False) if family.mlp_bias is None else family.mlp_bias,
            windows=read_windows(config, family, layers, str(path)),
            eos_ids=read_end_tokens(config, path.parent, vocab),
            dtype=_dtype(config, path),
        )


def _architecture(config: Fields, path: Path) -> str:
    names = config.get("architectures")
    served = ", ".join(FAMILIES)
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigError(f"{path}: 'architectures' must name the architecture; served are: {served}.")
    if names[0] not in FAMILIES:
        raise ConfigError(f"{path}: the architecture '{names[0]}' is not served; served are: {served}.")
    return names[0]


def _dtype(config: Fields, path: Path) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{path}: 'dtype' must be one of {', '.join(known)}, but is {name!r}.")
    return known[name]
