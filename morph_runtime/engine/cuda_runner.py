"""Steps on a GPU: inputs go up in one copy, decodes come out of CUDA graphs, tokens come back behind an event.

`launch` returns as soon as everything is enqueued on the steps' stream. A token that the next step needs
stays on the device: the sampler writes into a buffer from which the next step's embedding reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from morph_runtime.engine.cuda_attention import StepAttention
from morph_runtime.engine.cuda_graphs import GraphSet, graph_sizes
from morph_runtime.engine.cuda_inputs import StepInputs
from morph_runtime.engine.messages import SamplingParams, TokenLogprobs
from morph_runtime.engine.runner import Done, Launched, StepRunner
from morph_runtime.kernels.cuda.sample import sample
from morph_runtime.kernels.rung import Rung
from morph_runtime.models.batch import HostBatch
from morph_runtime.models.cuda_decoder import CudaDecoder, StepTensors
from morph_runtime.morph.swapper import LayerSwapper
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.sampler import Sampled, Sampler
from morph_runtime.weights.bound import LayerWeights

WARM_TOKENS = (
    1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 96, 97, 128, 129, 200, 256, 257, 512, 513, 1024, 1025, 2048,
)  # fmt: skip
"""Steps to run at start: each side of the sizes at which kernels change, divisible by 16 and not."""
SAMPLER_ROWS = 64
"""Rows that the host's sampler takes at a time: bounds the float32 scores."""
RESULTS = 2
"""Pinned buffers for sampled tokens: one step is in flight while the one before is read."""


@dataclass
class Blank:
    """A sequence of no tokens, to warm up with."""

    tokens: list[int] = field(default_factory=list)
    prompt_len: int = 0


@dataclass(frozen=True)
class Enqueued(Launched):
    """A step in the GPU's queue."""

    tokens: Tensor
    """int64 [rows], pinned; valid once the event is over and until the step after the next is launched"""
    event: torch.cuda.Event

    @property
    def ready(self) -> bool:
        """See `Launched.ready`."""
        return bool(self.event.query())

    def result(self) -> Sampled:
        """See `Launched.result`."""
        self.event.synchronize()
        return Sampled(self.tokens.tolist())


class CudaRunner(StepRunner):
    """Forward and sampling on one stream, which is current for the thread that calls."""

    def __init__(
        self,
        decoder: CudaDecoder,
        attention: StepAttention,
        inputs: StepInputs,
        swapper: LayerSwapper,
        sampler: Sampler,
        graphs: GraphSet | None,
        hidden: Tensor,
    ) -> None:
        """Put the parts together.

        Args:
            decoder: runs pieces of a step.
            attention: over the inputs' block tables.
            inputs: static buffers of a step.
            swapper: knows the layers of the next step.
            sampler: for rows that ask for more than a plain draw.
            graphs: empty, to be filled by `capture`; None: nothing is captured.
            hidden: [max tokens of a step, hidden]: the residual stream, static.
        """
        self._decoder, self._attention, self._inputs = decoder, attention, inputs
        self._swapper, self._sampler = swapper, sampler
        self._graphs, self._hidden = graphs, hidden
        self._sampled = torch.zeros(inputs.tensors["seeds"].shape[0], dtype=torch.int64, device=hidden.device)
        self._results = [torch.zeros(len(self._sampled), dtype=torch.int64, pin_memory=True) for _ in range(RESULTS)]
        self._turn = 0

    def launch(self, batch: HostBatch, rows: Sequence[SamplingRow], previous: Launched | None) -> Launched:
        """See `StepRunner.launch`."""
        plain = all(map(_is_simple, rows))
        size = 0
        if self._graphs is not None and batch.all_decodes:
            fine = plain and all(rung == "full" for rung in self._swapper.rungs)
            size = self._graphs.size_for(batch.num_sequences, fine)
        self._fill(batch, rows, size or batch.num_tokens)
        with torch.inference_mode():
            # Rows that score a prompt come last, whichever sequence they are of: only with them is another order.
            if size and len(rows) == batch.num_sequences and (plain or bool((np.diff(batch.logits_at) > 0).all())):
                logits = self._decode(size, plain)
            else:
                logits = self._mixed(batch, plain and bool(rows))
            if logits is not None and rows:
                return Done(self._sample_both(logits[: len(rows)], rows))
            self._turn = (self._turn + 1) % RESULTS
            result = self._results[self._turn][: len(rows)]
            result.copy_(self._sampled[: len(rows)], non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Enqueued(result, event)

    def close(self) -> None:
        """Free the graphs."""
        torch.cuda.synchronize()
        if self._graphs is not None:
            self._graphs.close()

    # -- what a step enqueues ------------------------------------------------------------------------------------

    def _fill(self, batch: HostBatch, rows: Sequence[SamplingRow], padded: int) -> None:
        """Write the inputs, padded to so many tokens, and send them on their way."""
        host, count, sequences = self._inputs.host(), batch.num_tokens, batch.num_sequences
        for name, values in (
            ("token_ids", batch.token_ids), ("positions", batch.positions), ("slots", batch.slots),
        ):  # fmt: skip
            host[name][:count] = values
        if padded > count:
            host["token_ids"][count:padded] = 0
            host["positions"][count:padded] = 0
            host["slots"][count:padded] = -1
            host["contexts"][sequences:padded] = 0
        host["contexts"][:sequences] = batch.contexts
        batch.pad_tables(host["tables"])
        if rows:
            host["logits_at"][: len(rows)] = batch.logits_at
            host["temperatures"][: len(rows)] = [row.params.temperature if row.draws else 0.0 for row in rows]
            host["seeds"][: len(rows)] = [row.draw_seed for row in rows]
            host["draws"][: len(rows)] = [row.output_len for row in rows]
        if not batch.all_decodes:
            self._attention.plan(batch, host)
        self._inputs.upload(sequences, int(batch.block_counts.max(initial=0)))

    def _step(self, tokens: int) -> StepTensors:
        tensors = self._inputs.tensors
        return StepTensors(tensors["token_ids"][:tokens], tensors["positions"][:tokens], tensors["slots"][:tokens])

    def _decode(self, size: int, plain: bool) -> Tensor | None:
        """A step of decodes, padded to a captured size; the logits unless `plain`."""
        assert self._graphs is not None
        rungs = set(self._swapper.rungs)
        if plain and len(rungs) == 1:
            self._graphs.replay((size, *rungs))
            return None
        self._graphs.replay((size, "embed"))
        for layer in self._swapper.layers:
            self._graphs.replay((size, layer.layer, layer.rung))
        if plain:
            self._graphs.replay((size, "head"))
            return None
        return self._decoder.head(self._hidden[:size], None)

    def _mixed(self, batch: HostBatch, plain: bool) -> Tensor | None:
        """Any step, without graphs; the logits unless `plain`."""
        step, hidden = self._step(batch.num_tokens), self._hidden[: batch.num_tokens]
        self._decoder.embed(step, self._sampled, hidden)
        delta: Tensor | None = None
        attend = self._attention.mixed if not batch.all_decodes else self._attention.decodes(batch.num_sequences)
        rows, layers = len(batch.logits_at), self._swapper.layers
        wanted = self._inputs.tensors["logits_at"][:rows] if rows else None
        for layer in layers[:-1]:
            hidden, delta = self._decoder.layer(layer, step, hidden, delta, attend)
        hidden, delta = self._decoder.layer(layers[-1], step, hidden, delta, attend, wanted)
        if not rows:
            return None
        logits = self._decoder.head(hidden, delta)
        if not plain:
            return logits
        self._choose(logits)
        return None

    def _sample_both(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
        """Rows that the device can draw are drawn there, so that their company changes nothing; the others on the host.

        Waits for the device; logits [rows, vocab].
        """
        self._choose(logits)
        tokens: list[int] = self._sampled[: len(rows)].tolist()
        special = [at for at, row in enumerate(rows) if not _is_simple(row)]
        found = self._sample(logits[torch.tensor(special, device=logits.device)], [rows[at] for at in special])
        for at, token in zip(special, found.tokens, strict=True):
            tokens[at] = token
        self._sampled[: len(rows)].copy_(torch.tensor(tokens))
        return Sampled(tokens, {special[row]: score for row, score in found.logprobs.items()})

    def _sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
        """What only the host's sampler can do, some rows at a time; logits [>= rows, vocab]. Waits for the device."""
        tokens: list[int] = []
        scores: dict[int, TokenLogprobs] = {}
        for first in range(0, len(rows), SAMPLER_ROWS):
            part = rows[first : first + SAMPLER_ROWS]
            sampled = self._sampler.sample(logits[first : first + len(part)].float(), part)
            tokens += sampled.tokens
            scores |= {first + row: score for row, score in sampled.logprobs.items()}
        return Sampled(tokens, scores)

    def _choose(self, logits: Tensor) -> None:
        """Draw a token per row into the buffer that the next step reads; logits [R, vocab]."""
        tensors, rows = self._inputs.tensors, logits.shape[0]
        sample(
            logits, tensors["temperatures"][:rows], tensors["seeds"][:rows], tensors["draws"][:rows],
            self._sampled[:rows],
        )  # fmt: skip

    # -- graphs --------------------------------------------------------------------------------------------------

    def warm_up(self, layer: LayerWeights) -> None:
        """Run once what will be captured or launched, so that kernels are compiled and libraries have their workspaces.

        Args:
            layer: one layer at some rung, its slot mapped; it serves as the whole model.
        """
        most, batch = self._hidden.shape[0], len(self._sampled)
        tokens = sorted({min(n, most) for n in WARM_TOKENS} | {most})
        # One layer of each kind of attention stands for all: kernels differ by whether there is a window.
        windows = {bool(window): at for at, window in reversed(list(enumerate(self._decoder.windows)))}
        kinds = [replace(layer, layer=at) for at in windows.values()]
        with torch.inference_mode():
            for size in graph_sizes(batch):
                self._clear(size)
                self._embed(size)
                for kind in kinds:
                    self._single(size, kind)
                self._head(size, None)
            for count in tokens:
                self._warm_mixed([count - 1, 1] if count > 2 and batch > 1 else [count], kinds)
            for decodes in graph_sizes(batch):  # each way of splitting contexts, in company of a chunk
                if decodes + 2 <= most and decodes < batch:
                    self._warm_mixed([2, *[1] * decodes], kinds)
            params = SamplingParams(temperature=1.0, top_p=0.9, top_k=20, min_p=0.01, logprobs=1)
            self._sample_both(
                self._decoder.head(self._hidden[:batch], None), [SamplingRow(params, Blank()) for _ in range(batch)]
            )

    def capture(
        self, stream: torch.cuda.Stream, bind: Callable[[int, Rung], LayerWeights], rungs: Sequence[Rung]
    ) -> None:
        """Capture every graph. Nothing runs.

        Args:
            stream: to capture on.
            bind: a layer at a rung; its slot need not be mapped.
            rungs: full precision and those of the ladder.
        """
        graphs = self._graphs
        if graphs is None:
            return
        count = len(self._swapper.layers)
        with torch.inference_mode():
            for size in reversed(graphs.sizes):  # the largest first: the pool then holds what the others need
                coarse = size in graphs.coarse
                for rung in rungs if coarse else rungs[:1]:
                    layers = [bind(layer, rung) for layer in range(count)]
                    graphs.capture((size, rung), stream, partial(self._whole, size, layers))
                    for layer in layers if coarse else ():
                        graphs.capture((size, layer.layer, rung), stream, partial(self._single, size, layer))
                if coarse:
                    graphs.capture((size, "embed"), stream, partial(self._embed, size))
                    graphs.capture((size, "head"), stream, partial(self._head, size, None))

    def _warm_mixed(self, parts: Sequence[int], kinds: Sequence[LayerWeights]) -> None:
        """Sequences of so many tokens each, which read block 0 throughout; nothing is written."""
        host = self._inputs.host()
        lengths = np.array(parts, dtype=np.int32)
        tokens, sequences = int(lengths.sum()), len(lengths)
        for name, value in (("token_ids", 0), ("positions", 0), ("slots", -1)):
            host[name][:tokens] = value
        host["contexts"][:sequences] = np.minimum(lengths, self._attention.max_context)
        host["tables"][:sequences] = 0
        host["logits_at"][:sequences] = 0
        host["temperatures"][:sequences] = 1.0
        zeros, nothing = np.zeros(tokens, dtype=np.int64), np.zeros(0, dtype=np.int32)
        batch = HostBatch(zeros, zeros, zeros, lengths, lengths, nothing, nothing, zeros[:sequences])
        self._attention.plan(batch, host)
        self._inputs.upload(sequences, host["tables"].shape[1])
        step, hidden = self._step(tokens), self._hidden[:tokens]
        self._decoder.embed(step, self._sampled, hidden)
        for kind in kinds:
            hidden, delta = self._decoder.layer(kind, step, hidden, None, self._attention.mixed)
        self._choose(self._decoder.head(hidden[:sequences], delta[:sequences]))

    def _embed(self, size: int) -> None:
        self._decoder.embed(self._step(size), self._sampled, self._hidden[:size])

    def _head(self, size: int, delta: Tensor | None) -> None:
        self._choose(self._decoder.head(self._hidden[:size], delta))

    def _single(self, size: int, layer: LayerWeights) -> None:
        hidden = self._hidden[:size]
        _, delta = self._decoder.layer(layer, self._step(size), hidden, None, self._attention.decodes(size))
        hidden.add_(delta)

    def _whole(self, size: int, layers: Sequence[LayerWeights]) -> None:
        self._embed(size)
        step, hidden, attend = self._step(size), self._hidden[:size], self._attention.decodes(size)
        delta: Tensor | None = None
        for layer in layers:
            hidden, delta = self._decoder.layer(layer, step, hidden, delta, attend)
        self._head(size, delta)

    def _clear(self, size: int) -> None:
        """Inputs of padding rows alone."""
        host = self._inputs.host()
        for name, value in (("token_ids", 0), ("positions", 0), ("slots", -1), ("contexts", 0), ("temperatures", 0)):
            host[name][:size] = value
        self._inputs.upload(size, 0)


def _is_simple(row: SamplingRow) -> bool:
    """Whether the device can draw this row's token alone."""
    params = row.params
    return row.plain and (not row.draws or (params.top_p >= 1 and params.top_k <= 0 and params.min_p <= 0))
