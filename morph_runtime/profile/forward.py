"""Forward passes over windows, layer by layer, so that what two mixes share is computed once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from morph_runtime.models.batch import SequenceSlice, StepBatch
from morph_runtime.models.decoder import Decoder
from morph_runtime.profile.weights import Form, LayerStore, Mix
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.spec import ModelSpec

BLOCK_TOKENS = 16
"""Tokens per KV block, as the engine has by default."""


class LayeredForward(ABC):
    """Runs windows of one length, each as the prefill of a prompt in one step, by the decoder and kernels that serve.

    Tensors are on the device; none that was given or returned is changed later. Runs under inference mode.
    """

    @abstractmethod
    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Token ids [T] -> hidden states [T, hidden] before the first layer."""

    @abstractmethod
    def layer(self, weights: LayerWeights, hidden: Tensor) -> Tensor:
        """Hidden states [T, hidden] before a layer -> behind it."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, hidden] behind the last layer -> float32 [T, vocab]."""


class OneLayerKV:
    """A paged cache that all layers share: a window is prefilled in one step, so a layer's K and V are read only while
    that layer runs."""

    def __init__(self, spec: ModelSpec, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate `blocks` blocks, zeroed."""
        shape = (blocks, BLOCK_TOKENS, spec.kv_heads, spec.head_dim)
        self._k, self._v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._none = torch.empty(blocks, 0, dtype=torch.uint8, device=device)

    def k(self, layer: int) -> Tensor:
        """See `PagedKV.k`; the same for every layer."""
        return self._k

    def v(self, layer: int) -> Tensor:
        """See `PagedKV.v`; the same for every layer."""
        return self._v

    def k_side(self, layer: int) -> Tensor:
        """Nothing: there are no scales."""
        return self._none

    def v_side(self, layer: int) -> Tensor:
        """Nothing: there are no scales."""
        return self._none


class CpuForward(LayeredForward):
    """On the CPU, by `models.decoder.Decoder`."""

    def __init__(self, store: LayerStore, length: int) -> None:
        """`length`: tokens of every window."""
        spec, dtype = store.models["full"].spec, store.static.embedding.dtype
        blocks = -(-length // BLOCK_TOKENS)
        kv = OneLayerKV(spec, blocks, dtype, torch.device("cpu"))
        scratch = torch.empty(store.scratch_bytes, dtype=torch.uint8)
        self._decoder = Decoder(spec, store.static, kv, scratch, length)
        ids = torch.zeros(length, dtype=torch.int64)
        places, table = torch.arange(length), list(range(blocks))
        # Slots are positions, for the blocks are taken in order.
        self._batch = StepBatch(ids, places, places, [SequenceSlice(0, length, length)], [table], places)
        self._plan = self._decoder.begin(self._batch)[1]

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """See `LayeredForward.embed`."""
        self._batch.token_ids = torch.tensor(tokens)
        hidden, self._plan = self._decoder.begin(self._batch)
        return hidden

    def layer(self, weights: LayerWeights, hidden: Tensor) -> Tensor:
        """See `LayeredForward.layer`."""
        return self._decoder.layer(weights, self._plan, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `LayeredForward.logits`."""
        return self._decoder.head(hidden).float()


class Walk:
    """One window under many mixes; keeps the hidden states between the layers of the last one: [T, hidden] each."""

    def __init__(self, forward: LayeredForward, store: LayerStore, tokens: Sequence[int]) -> None:
        """Embed the window."""
        self._forward, self._store = forward, store
        self._mix: Mix = ()
        self.states: list[Tensor] = [forward.embed(tokens)]
        """Before layer 0, behind it, and so on: of the mix that was run last."""

    def run(self, mix: Mix) -> Tensor:
        """The logits [T, vocab], float32; layers ahead of the first that has changed are not run again."""
        same = 0
        while same < len(self._mix) and self._mix[same] == mix[same]:
            same += 1
        del self.states[same + 1 :]
        for number in range(same, len(mix)):
            self.states.append(self._forward.layer(self._store.layer(number, mix[number]), self.states[-1]))
        self._mix = mix
        return self._forward.logits(self.states[-1])

    def one_layer(self, number: int, form: Form) -> Tensor:
        """What one layer in another form makes of the input that it has in the last run: [T, hidden]."""
        return self._forward.layer(self._store.layer(number, form), self.states[number])

    def run_changed(self, number: int, form: Form) -> Tensor:
        """The logits [T, vocab] of the last run's mix with one layer changed; that run stays the last."""
        hidden = self.one_layer(number, form)
        for after in range(number + 1, len(self._mix)):
            hidden = self._forward.layer(self._store.layer(after, self._mix[after]), hidden)
        return self._forward.logits(hidden)
