"""The decoder on a GPU: the operations of a step over static buffers, so that they can be captured in graphs.

It runs what it is told, in pieces (`embed`, `layer`, `head`); which of them come out of a graph is the runner's
business (engine.cuda_runner). Like the CPU's decoder it knows nothing of morphing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.activation import Fp8Rows
from morph_runtime.kernels.attention import PagedKV
from morph_runtime.kernels.cuda.embed import embed
from morph_runtime.kernels.cuda.fused import add_norm, quantize_rows, swiglu
from morph_runtime.kernels.cuda.rope import rope_store
from morph_runtime.kernels.rope import RopeTable
from morph_runtime.weights.bound import BoundLinear, LayerWeights
from morph_runtime.weights.spec import ModelSpec
from morph_runtime.weights.static import StaticTensors

Attend = Callable[[Tensor, int, int], Tensor]
"""(q [T, heads, head_dim], layer, window) -> [T, heads * head_dim]: attention over what has been stored."""


@dataclass(frozen=True)
class StepTensors:
    """The inputs of a step on the device; views of static buffers."""

    token_ids: Tensor
    """int64 [T]; -1 - row: what the step before sampled in that row"""
    positions: Tensor
    """int64 [T]"""
    slots: Tensor
    """int64 [T]; -1: a padding row"""


class CudaDecoder:
    """Runs pieces of a step on the current stream. One thread at a time."""

    def __init__(
        self, spec: ModelSpec, static: StaticTensors, kv: PagedKV, scratch: Tensor, max_model_len: int
    ) -> None:
        """Look up what stays the same for life.

        Args:
            spec: the model.
            static: embedding, final norm and output matrix, on the device.
            kv: the cache.
            scratch: uint8 [>= LayerSlots.scratch_bytes], overwritten by every layer.
            max_model_len: tokens of the longest request.

        Raises:
            ConfigError: the cache has another shape than the model.
        """
        keys = kv.k(0)
        if tuple(keys.shape[2:]) != (spec.kv_heads, spec.head_dim):
            raise ConfigError(
                f"The KV cache holds {tuple(keys.shape[2:])} per token, but the model needs "
                f"{(spec.kv_heads, spec.head_dim)}."
            )
        self._spec, self._static, self._scratch = spec, static, scratch
        self._k = [kv.k(layer) for layer in range(spec.layers)]
        self._v = [kv.v(layer) for layer in range(spec.layers)]
        self._table = RopeTable(spec.rope, spec.head_dim, max_model_len, static.embedding.dtype).to(keys.device)

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens that each layer's queries see; 0: all before them."""
        return self._spec.windows

    def embed(self, step: StepTensors, sampled: Tensor, hidden: Tensor) -> None:
        """Write the embeddings of the step's tokens.

        Args:
            step: [T] tokens.
            sampled: int64 [rows of the step before]: what that one sampled.
            hidden: [T, hidden], overwritten.
        """
        embed(step.token_ids, sampled, self._static.embedding, hidden)

    def layer(
        self,
        layer: LayerWeights,
        step: StepTensors,
        hidden: Tensor,
        delta: Tensor | None,
        attend: Attend,
    ) -> Tensor:
        """Run one layer.

        Args:
            layer: its weights, at any rung.
            step: [T] tokens.
            hidden: [T, hidden], the residual stream; `delta` and the attention's part are added in place.
            delta: [T, hidden], what the layer before wants added; None: nothing.
            attend: the attention of this step.

        Returns:
            What is to be added to the residual stream after this layer: [T, hidden].
        """
        return self.behind_attention(layer, hidden, self.attention(layer, step, hidden, delta, attend))

    def attention(
        self, layer: LayerWeights, step: StepTensors, hidden: Tensor, delta: Tensor | None, attend: Attend
    ) -> Tensor:
        """A layer's first part: it stores K and V and attends; arguments as of `layer`.

        Returns:
            [T, heads * head_dim], before the output projection.
        """
        spec, rows = self._spec, hidden.shape[0]
        x = add_norm(hidden, delta, layer.input_norm, spec.norm_eps, fp8=layer.qkv.kernel.wants_fp8(rows))
        qkv = self._run(layer.qkv, x)
        k_cache, v_cache = self._k[layer.layer], self._v[layer.layer]
        rope_store(
            qkv, step.positions, step.slots, self._table.tensor, k_cache, v_cache,
            spec.heads, spec.kv_heads, spec.head_dim, layer.qk_norm, spec.norm_eps,
        )  # fmt: skip
        queries = qkv[:, : spec.heads * spec.head_dim].view(rows, spec.heads, spec.head_dim)
        return attend(queries, layer.layer, spec.windows[layer.layer])

    def behind_attention(self, layer: LayerWeights, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a layer, for all tokens of a step or for some.

        Args:
            layer: its weights.
            hidden: [R, hidden], the residual stream of these tokens; the attention's part is added in place.
            mixed: [R, heads * head_dim], of `attention`.

        Returns:
            What is to be added after this layer: [R, hidden].
        """
        spec, rows = self._spec, hidden.shape[0]
        o = self._run(layer.o, mixed)
        x = add_norm(hidden, o, layer.post_norm, spec.norm_eps, fp8=layer.gate_up.kernel.wants_fp8(rows))
        gate_up = self._run(layer.gate_up, x)
        return self._run(layer.down, swiglu(gate_up, fp8=layer.down.kernel.wants_fp8(rows)))

    def head(self, hidden: Tensor, delta: Tensor | None, out: Tensor | None = None) -> Tensor:
        """The logits of tokens.

        Args:
            hidden: [R, hidden]; `delta` is added in place.
            delta: [R, hidden] or None.
            out: [R, vocab] of the activations' type; None: a new one.

        Returns:
            `out`.
        """
        x = add_norm(hidden, delta, self._static.final_norm, self._spec.norm_eps)
        assert isinstance(x, Tensor)
        if out is None:
            return F.linear(x, self._static.lm_head)
        return torch.mm(x, self._static.lm_head.t(), out=out)

    def _run(self, linear: BoundLinear, x: Tensor | Fp8Rows) -> Tensor:
        """x W^T + b; quantizes what has not been quantized on the way."""
        if isinstance(x, Tensor):
            if linear.input_scale is not None:
                x = x * linear.input_scale
            if linear.kernel.wants_fp8(x.shape[0]):
                x = quantize_rows(x)
        if isinstance(x, Fp8Rows):
            y = linear.kernel.run_fp8(x, linear.tensors, self._scratch)
        else:
            y = linear.kernel.run(x, linear.tensors, self._scratch)
        return y if linear.bias is None else y.add_(linear.bias)
