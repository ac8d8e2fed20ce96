"""A decoder-only transformer over a paged KV cache; the layers' weights come anew with every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.attention import AttentionShape, PagedKV
from morph_runtime.kernels.attention_cpu import CpuPagedAttention, CpuPlan
from morph_runtime.kernels.kv_format import KVFormat, PlainKV
from morph_runtime.kernels.pointwise import head_norm, rms_norm, swiglu
from morph_runtime.kernels.rope import RopeTable
from morph_runtime.models.batch import StepBatch
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.spec import ModelSpec
from morph_runtime.weights.static import StaticTensors


@dataclass(frozen=True)
class StepPlan:
    """What all layers of a step share."""

    slots: Tensor
    """int64 [T]: where each token's K and V are written"""
    cos: Tensor
    sin: Tensor
    """As `RopeTable.lookup` gives them."""
    plans: Mapping[int, CpuPlan]
    """Attention's, by window."""


class Decoder:
    """Runs steps. Knows nothing of morphing: any mix of rungs will do. One thread at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        static: StaticTensors,
        kv: PagedKV,
        scratch: Tensor,
        max_model_len: int = 0,
        kv_format: KVFormat | None = None,
    ) -> None:
        """Look up what stays the same for life.

        Args:
            spec: the model.
            static: embedding, final norm and output matrix; their type is that of the activations.
            kv: the cache; its tensors are looked up once.
            scratch: uint8 [>= LayerSlots.scratch_bytes], aligned to 64 bytes, overwritten by every forward.
            max_model_len: tokens of the longest request; 0: the model's `max_positions`.
            kv_format: how `kv` stores numbers; None: in the type of the activations.

        Raises:
            ConfigError: `max_model_len` is beyond the model's limit, or the cache has another shape or type.
        """
        limit = max_model_len or spec.max_positions
        if limit > spec.longest_context:
            raise ConfigError(
                f"model.max_model_len is {limit}, but the model is made for {spec.longest_context} tokens."
            )
        dtype, keys = static.embedding.dtype, kv.k(0)
        kv_format = kv_format or PlainKV(dtype)
        if tuple(keys.shape[2:]) != (spec.kv_heads, spec.head_dim) or keys.dtype != kv_format.element:
            raise ConfigError(
                f"The KV cache holds {tuple(keys.shape[2:])} of {keys.dtype} per token, "
                f"but the model needs {(spec.kv_heads, spec.head_dim)} of {kv_format.element}."
            )
        self._spec, self._static, self._scratch = spec, static, scratch
        shape = AttentionShape(spec.heads, spec.kv_heads, spec.head_dim, keys.shape[1], limit)
        self._attention = CpuPagedAttention(shape, kv, spec.layers, dtype, kv_format)
        self._windows = set(spec.windows)
        self._rope = RopeTable(spec.rope, spec.head_dim, limit, dtype)

    @property
    def workspace_bytes(self) -> int:
        """Memory that it holds for life, `scratch` apart: attention's workspace and the rotary table."""
        return self._attention.workspace_bytes + self._rope.nbytes

    @staticmethod
    def workspace_for(spec: ModelSpec, max_model_len: int, block_tokens: int, kv_format: KVFormat, tokens: int) -> int:
        """Upper bound of `workspace_bytes` and of the activations of a step of `tokens` tokens, in bytes."""
        shape = AttentionShape(spec.heads, spec.kv_heads, spec.head_dim, block_tokens, max_model_len)
        itemsize = kv_format.dtype.itemsize
        table = max_model_len * 2 * spec.head_dim * itemsize
        # The widest moment of a layer: residual, norm, qkv or the MLP's inner values, and their product.
        width = 2 * spec.hidden + max(3 * spec.ffn, 2 * (spec.heads + 2 * spec.kv_heads) * spec.head_dim)
        return CpuPagedAttention.workspace_for(shape, kv_format) + table + tokens * width * itemsize

    def forward(self, batch: StepBatch, layers: Sequence[LayerWeights]) -> Tensor:
        """Run one step: writes the K and V of its tokens, returns logits.

        Args:
            batch: the step; it must hold together (models.batch.check_batch).
            layers: the weights of every layer in order, each at any rung.

        Returns:
            float32 [S, vocab], a new tensor: row i belongs to token logits_at[i].
        """
        logits = torch.empty(batch.logits_at.shape[0], self._spec.vocab, dtype=torch.float32)
        with torch.inference_mode():
            hidden, step = self.begin(batch)
            for layer in layers[:-1]:
                hidden = self.layer(layer, step, hidden)
            # Behind the last attention only the tokens in logits_at matter.
            hidden = self.layer(layers[-1], step, hidden, batch.logits_at)
            if hidden.shape[0]:
                logits.copy_(self.head(hidden))
        return logits

    def begin(self, batch: StepBatch) -> tuple[Tensor, StepPlan]:
        """The hidden states [T, hidden] before the first layer, and what all layers of the step share."""
        cos, sin = self._rope.lookup(batch.positions)
        plans = {w: self._attention.plan(batch.sequences, batch.block_tables, w) for w in self._windows}
        hidden = self._static.embedding.index_select(0, batch.token_ids)
        return hidden, StepPlan(batch.slots, cos, sin, plans)

    def layer(self, layer: LayerWeights, step: StepPlan, hidden: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Run one layer: writes the K and V of its tokens.

        Args:
            layer: its weights, at any rung.
            step: of `begin`.
            hidden: [T, hidden], what the layer before returned; not changed.
            wanted: int64 [S]: the tokens that matter behind the attention; None: all.

        Returns:
            [S or T, hidden], a new tensor.
        """
        spec, scratch, eps = self._spec, self._scratch, self._spec.norm_eps
        tokens, queries, head_dim = hidden.shape[0], spec.heads, spec.head_dim
        rotated_heads = queries + spec.kv_heads
        rotated = rotated_heads * head_dim
        qkv = layer.qkv.run(rms_norm(hidden, layer.input_norm, eps), scratch)
        plan = step.plans[spec.windows[layer.layer]]
        qk = qkv[:, :rotated].view(tokens, rotated_heads, head_dim)
        if layer.qk_norm is not None:
            qk = head_norm(qk, layer.qk_norm, eps)
        qk = self._rope.rotate(qk, step.cos, step.sin)
        values = qkv[:, rotated:].view(tokens, spec.kv_heads, head_dim)
        self._attention.store(qk[:, queries:], values, step.slots, layer.layer, plan)
        if wanted is not None and wanted.shape[0] == 0:
            return hidden[:0]
        mixed = self._attention.run(qk[:, :queries], layer.layer, plan)
        if wanted is not None:
            mixed, hidden = mixed.index_select(0, wanted), hidden.index_select(0, wanted)
        hidden = layer.o.run(mixed, scratch).add_(hidden)
        gate_up = layer.gate_up.run(rms_norm(hidden, layer.post_norm, eps), scratch)
        return layer.down.run(swiglu(gate_up), scratch).add_(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states [S, hidden] behind the last layer: [S, vocab] of the activations' type."""
        return F.linear(rms_norm(hidden, self._static.final_norm, self._spec.norm_eps), self._static.lm_head)
