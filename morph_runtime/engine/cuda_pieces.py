"""The pieces of a step on a GPU, over static buffers: each can be run as it is, or captured in a CUDA graph.

A step of decodes is `embed`, a `decode_layer` for each layer and `head`, all at the padded batch size; `decode_step` is
these in one. Any other step is `embed`, a `layer` for each layer but the last and `last_attention`, all at the padded
number of tokens; `step` is these in one. Then comes `tail` over the rows whose next token is wanted: the last layer's
rest for few rows is much less work than for all. Logits stay where they are until the next step's: `choose_shaped`
chooses again where a row asks for more than a draw from all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from morph_runtime.engine.cuda_attention import Room, StepAttention
from morph_runtime.engine.cuda_inputs import StepInputs
from morph_runtime.kernels.cuda.sample import sample
from morph_runtime.kernels.cuda.shape import RowShapes, sample_shaped
from morph_runtime.models.cuda_decoder import CudaDecoder, StepTensors
from morph_runtime.weights.bound import LayerWeights


class StepPieces:
    """Each method enqueues work on the current stream and returns; shapes follow from its arguments alone."""

    def __init__(
        self, decoder: CudaDecoder, attention: StepAttention, inputs: StepInputs, hidden: Tensor, logits: Tensor
    ) -> None:
        """Put the parts together.

        Args:
            decoder: computes.
            attention: over the inputs' block tables.
            inputs: static buffers of a step.
            hidden: [max tokens of a step, hidden]: the residual stream, static.
            logits: [max sequences, vocab], static.
        """
        self.decoder, self.attention = decoder, attention
        self.logits = logits
        """Of the last step, by row; banned and biased tokens have none behind `choose_shaped`"""
        self._inputs, self._hidden = inputs, hidden
        tensors = inputs.tensors
        self._shapes = RowShapes(
            tensors["top_ps"], tensors["top_ks"], tensors["min_ps"],
            tensors["entries"], tensors["entry_tokens"], tensors["entry_biases"],
        )  # fmt: skip
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
        self.head(size, delta)

    def head(self, size: int, delta: Tensor | None = None) -> None:
        """Logits of the first `size` tokens, and a token of each; the last layer's `delta` [size, hidden] is added."""
        self.decoder.head(self._hidden[:size], delta, self.logits[:size])
        self._choose(size)

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

    def tail(self, rows: int, layer: LayerWeights) -> None:
        """What is behind `last_attention`, for the first `rows` of the tokens in `logits_at`, and a token of each."""
        wanted = self._inputs.tensors["logits_at"][:rows]
        hidden = self._hidden.index_select(0, wanted)
        mixed = self.attention.attended.index_select(0, wanted)
        self.decoder.head(hidden, self.decoder.behind_attention(layer, hidden, mixed), self.logits[:rows])
        self._choose(rows)

    def choose_shaped(self, rows: int) -> None:
        """Choose the tokens of the first `rows` rows anew, out of what their shapes leave. Once for these logits."""
        sample_shaped(self.logits[:rows], *self._draws(rows), self._shapes.first(rows), self.sampled[:rows])

    def _choose(self, rows: int) -> None:
        """A token per row of the logits into `sampled`."""
        sample(self.logits[:rows], *self._draws(rows), self.sampled[:rows])

    def _draws(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Temperatures, seeds and positions."""
        tensors = self._inputs.tensors
        return tensors["temperatures"][:rows], tensors["seeds"][:rows], tensors["draws"][:rows]

    def _step(self, tokens: int) -> StepTensors:
        tensors = self._inputs.tensors
        return StepTensors(tensors["token_ids"][:tokens], tensors["positions"][:tokens], tensors["slots"][:tokens])
