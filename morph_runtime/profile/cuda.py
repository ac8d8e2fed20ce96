"""Measuring on a GPU, by the kernels that serve there: W8 is FP8, and W4 has another layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from morph_runtime.engine.opening import OpenModel
from morph_runtime.kernels.cuda.attention_prefill import prefill, prefill_tiles, tile_tokens
from morph_runtime.models.cuda_decoder import CudaDecoder, StepTensors
from morph_runtime.profile.forward import BLOCK_TOKENS, LayeredForward, OneLayerKV
from morph_runtime.profile.weights import FORM_RUNG, Form, LayerStore
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.norms import copy_norms
from morph_runtime.weights.static import StaticTensors


class CudaLayerStore(LayerStore):
    """In the GPU's memory; W8 and W4 are quantized there, as a down-shift does, but for an AWQ checkpoint's."""

    def __init__(self, models: Mapping[Form, OpenModel], device: torch.device, say: Callable[[str], None]) -> None:
        """See `LayerStore`; the models are opened for `device`."""
        self._device = device
        self._host = models["full"].host_slots()
        super().__init__(models, say)

    def _fill(self, number: int, form: Form, source: LayerWeights | None) -> LayerWeights:
        slots, rung = self.models[form].slots, FORM_RUNG[form]
        slot = torch.empty(slots.slot_bytes(rung), dtype=torch.uint8, device=self._device)
        target = slots.bind(number, rung, slot)
        if source is None or (rung == "w4" and slots.reads_w4):
            filler = self._host if rung == "full" else slots
            host = torch.empty(slot.shape[0], dtype=torch.uint8)
            filler.fill(number, rung, host)
            slot.copy_(host)
            return target
        copy_norms(source, target)
        for full, linear in zip(source.linears, target.linears, strict=True):
            if linear.bias is not None and full.bias is not None:
                linear.bias.copy_(full.bias)
            linear.kernel.pack(full.tensors["weight"], linear.tensors)
        return target

    def _fill_static(self) -> StaticTensors:
        static = self.models["full"].static
        host = torch.empty(static.static_bytes, dtype=torch.uint8)
        static.fill(host)
        return static.bind(host.to(self._device))


class CudaForward(LayeredForward):
    """By `models.cuda_decoder.CudaDecoder`, each window as one prefill."""

    def __init__(self, store: LayerStore, length: int) -> None:
        """`length`: tokens of every window; the device is that of the store's weights."""
        spec, embedding = store.models["full"].spec, store.static.embedding
        device, blocks = embedding.device, -(-length // BLOCK_TOKENS)
        kv = OneLayerKV(spec, blocks, embedding.dtype, device)
        scratch = torch.empty(store.scratch_bytes, dtype=torch.uint8, device=device)
        self._decoder = CudaDecoder(spec, store.static, kv, scratch, length)
        self._k, self._v, self._scale = kv.k(0), kv.v(0), spec.head_dim**-0.5
        self._hidden = spec.hidden
        tile = tile_tokens(spec.heads, spec.kv_heads, spec.head_dim, self._k.element_size())
        self._tables = torch.arange(blocks, dtype=torch.int32, device=device)[None]  # [1, blocks]
        self._starts = torch.tensor([0, length], dtype=torch.int32, device=device)
        self._contexts = torch.tensor([length], dtype=torch.int32, device=device)
        self._tiles = torch.tensor(prefill_tiles([(0, length)], tile), dtype=torch.int32, device=device)
        # Slots are positions, for the blocks are taken in order.
        self._places = torch.arange(length, device=device)
        self._step = StepTensors(self._places, self._places, self._places)
        self._none = torch.zeros(1, dtype=torch.int64, device=device)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """See `LayeredForward.embed`."""
        ids = torch.tensor(tokens, device=self._places.device)
        hidden = torch.empty(len(tokens), self._hidden, dtype=self._k.dtype, device=ids.device)
        self._decoder.embed(StepTensors(ids, self._places, self._places), self._none, hidden)
        return hidden

    def layer(self, weights: LayerWeights, hidden: Tensor) -> Tensor:
        """See `LayeredForward.layer`."""
        # The decoder adds in place, and leaves what comes last to the layer behind it, which rounds it just so.
        residual = hidden.clone()
        delta = self._decoder.layer(weights, self._step, residual, None, self._attend)
        return residual.add_(delta)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `LayeredForward.logits`."""
        return self._decoder.head(hidden.clone(), None).float()

    def _attend(self, q: Tensor, layer: int, window: int) -> Tensor:
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        prefill(
            q, self._k, self._v, self._tables, self._starts, self._contexts, self._tiles, out,
            scale=self._scale, window=window,
        )  # fmt: skip
        return out
