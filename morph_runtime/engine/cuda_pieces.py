"""The pieces of a step on a GPU, over static buffers: each can be run as it is, or captured in a CUDA graph.

A step of decodes is `embed`, a `decode_layer` for each layer and `head`, all at the padded batch size; `decode_step` is
these in one. Any other step is `embed`, a `layer` for each layer but the last and `last_attention`, all at the padded
number of tokens; `step` is these in one. Then comes `tail` over the rows whose next token is wanted: the last layer's
rest for few rows is much less work than for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from morph_runtime.engine.cuda_attention import Room, StepAttention
from morph_runtime.engine.cuda_inputs import StepInputs
from morph_runtime.kernels.cuda.sample import sample
from morph_runtime.models.cuda_decoder import CudaDecoder, StepTensors
from morph_runtime.weights.bound import LayerWeights


class StepPieces:
    """Each method enqueues work on the current stream and returns; shapes follow from its arguments alone."""

    def __init__(self, decoder: CudaDecoder, attention: StepAttention, inputs: StepInputs, hidden: Tensor) -> None:
        """Put the parts together.

        Args:
            decoder: computes.
            attention: over the inputs' block tables.
            inputs: static buffers of a step.
            hidden: [max tokens of a step, hidden]: the residual stream, static.
        """
        self.decoder, self.attention = decoder, attention
        self._inputs, self._hidden = inputs, hidden
        self.sampled = torch.zeros(inputs.tensors["seeds"].shape[0], dtype=torch.int64, device=hidden.device)
        """int64 [max sequences]: what the step before sampled, by row"""

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest step."""
        return self._hidden.shape[0]

    def embed(self, size: int) -> None:
        """The embeddings of `size` tokens."""
        self.decoder.embed(self._step(size), self.sampled, self._hidden[:size])

    def decode_layer(self, size: int, layer: LayerWeights) -> None:
        """One layer of `size` decodes."""
        hidden = self._hidden[:size]
        hidden.add_(self.decoder.layer(layer, self._step(size), hidden, None, self.attention.decodes(size)))

    def decode_step(self, size: int, layers: Sequence[LayerWeights]) -> None:
        """A whole step of `size` decodes, tokens chosen."""
        self.embed(size)
        step, hidden, attend = self._step(size), self._hidden[:size], self.attention.decodes(size)
        delta: Tensor | None = None
        for layer in layers:
            delta = self.decoder.layer(layer, step, hidden, delta, attend)
        self.choose(self.head(size, delta))

    def head(self, size: int, delta: Tensor | None = None) -> Tensor:
        """The logits [size, vocab] of the first tokens; `delta` [size, hidden] of the last layer is added."""
        return self.decoder.head(self._hidden[:size], delta)

    def layer(self, size: int, room: Room, layer: LayerWeights) -> None:
        """One layer of a step of `size` tokens, as planned (`StepAttention.plan`)."""
        hidden, attend = self._hidden[:size], self.attention.planned(size, room)
        hidden.add_(self.decoder.layer(layer, self._step(size), hidden, None, attend))

    def last_attention(self, size: int, room: Room, layer: LayerWeights) -> None:
        """The last layer's attention of a step of `size` tokens; it stays in `StepAttention.attended`."""
        self.decoder.attention(layer, self._step(size), self._hidden[:size], None, self.attention.planned(size, room))

    def step(self, size: int, room: Room, layers: Sequence[LayerWeights]) -> None:
        """A whole step of `size` tokens, up to the last layer's attention."""
        self.embed(size)
        step, hidden, attend = self._step(size), self._hidden[:size], self.attention.planned(size, room)
        delta: Tensor | None = None
        for layer in layers[:-1]:
            delta = self.decoder.layer(layer, step, hidden, delta, attend)
        self.decoder.attention(layers[-1], step, hidden, delta, attend)

    def tail(self, rows: int, layer: LayerWeights) -> Tensor:
        """What is behind `last_attention`, for the first `rows` of the tokens in `logits_at`: logits [rows, vocab]."""
        wanted = self._inputs.tensors["logits_at"][:rows]
        hidden = self._hidden.index_select(0, wanted)
        mixed = self.attention.attended.index_select(0, wanted)
        return self.decoder.head(hidden, self.decoder.behind_attention(layer, hidden, mixed))

    def choose(self, logits: Tensor) -> None:
        """Draw a token per row of logits [R, vocab] into `sampled`."""
        tensors, rows = self._inputs.tensors, logits.shape[0]
        sample(
            logits, tensors["temperatures"][:rows], tensors["seeds"][:rows], tensors["draws"][:rows],
            self.sampled[:rows],
        )  # fmt: skip

    def _step(self, tokens: int) -> StepTensors:
        tensors = self._inputs.tensors
        return StepTensors(tensors["token_ids"][:tokens], tensors["positions"][:tokens], tensors["slots"][:tokens])
