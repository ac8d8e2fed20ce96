"""Steps on a GPU: inputs go up in one copy, work comes out of CUDA graphs, tokens come back behind an event.

`launch` returns as soon as everything is enqueued on the steps' stream. A token that the next step needs
stays on the device: the sampler writes into a buffer from which the next step's embedding reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morph_runtime.engine.cuda_attention import Room
from morph_runtime.engine.cuda_graphs import (
    GraphSet,
    coarse_sizes,
    coarse_steps,
    graph_sizes,
    next_size,
    roomy_steps,
    step_sizes,
)
from morph_runtime.engine.cuda_inputs import StepInputs, fill_shapes
from morph_runtime.engine.cuda_pieces import StepPieces
from morph_runtime.engine.messages import SamplingParams, TokenLogprobs
from morph_runtime.engine.runner import Done, Launched, StepRunner
from morph_runtime.kernels.rung import Rung
from morph_runtime.models.batch import HostBatch
from morph_runtime.morph.swapper import LayerSwapper
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.sampler import Sampled, Sampler
from morph_runtime.sampling.shape import Entries, ways
from morph_runtime.weights.bound import LayerWeights

SAMPLER_ROWS = 16
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
        pieces: StepPieces,
        inputs: StepInputs,
        swapper: LayerSwapper,
        sampler: Sampler,
        eos: Sequence[int],
        graphs: GraphSet | None,
        rungs: int,
    ) -> None:
        """Put the parts together.

        Args:
            pieces: of a step.
            inputs: static buffers of a step.
            swapper: knows the layers of the next step.
            sampler: for rows that ask for more than the device can do.
            eos: tokens that end an output.
            graphs: empty, to be filled by `capture`; None: nothing is captured, each piece is launched by itself.
            rungs: how many a layer can be at.
        """
        self._pieces, self._inputs = pieces, inputs
        self._swapper, self._sampler, self._eos, self._graphs = swapper, sampler, tuple(eos), graphs
        most = len(pieces.sampled)
        self._batch_sizes = graph_sizes(most)
        self._row_sizes = coarse_sizes(self._batch_sizes)
        self._step_sizes = step_sizes(pieces.max_tokens)
        self._coarse_steps = coarse_steps(self._step_sizes)
        self._roomy_steps = frozenset(roomy_steps(self._coarse_steps, len(swapper.layers) * rungs))
        self._results = [torch.zeros(most, dtype=torch.int64, pin_memory=True) for _ in range(RESULTS)]
        self._turn = 0

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """See `StepRunner.step_sizes`."""
        return self._step_sizes

    @property
    def mixed_step_sizes(self) -> tuple[int, ...]:
        """See `StepRunner.mixed_step_sizes`."""
        return self._coarse_steps

    def launch(self, batch: HostBatch, rows: Sequence[SamplingRow], previous: Launched | None) -> Launched:
        """See `StepRunner.launch`."""
        found = ways(rows, self._eos)
        # Rows that score a prompt come last, whichever sequence they are of: only with them is another order.
        decodes = batch.all_decodes and len(rows) == batch.num_sequences
        decodes = decodes and (not found.special or bool((np.diff(batch.logits_at) > 0).all()))
        rungs = self._swapper.rungs
        rung = rungs[0] if len(set(rungs)) == 1 else None
        usual = decodes or self._pieces.attention.is_usual(batch)
        if decodes:
            size = self._decode_size(len(rows), rung)
        else:
            if not usual:
                rung = None  # layer by layer, where there is room for all
            size = next_size(self._coarse_steps if rung is None else self._step_sizes, batch.num_tokens)
        self._fill(batch, rows, found.shaped, size, planned=not decodes)
        with torch.inference_mode():
            if decodes:
                self._decode(size, rung)
            else:
                self._step(size, rung, usual, len(rows))
            if found.shaped:
                padded = next_size(self._row_sizes, len(rows))
                self._run(("shaped", padded), self._pieces.choose_shaped, padded)
            if found.special:
                return Done(self._sample_special(rows, found.special))
            self._turn = (self._turn + 1) % RESULTS
            result = self._results[self._turn][: len(rows)]
            result.copy_(self._pieces.sampled[: len(rows)], non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Enqueued(result, event)

    def close(self) -> None:
        """Free the graphs."""
        torch.cuda.synchronize()
        if self._graphs is not None:
            self._graphs.close()

    # -- what a step enqueues ------------------------------------------------------------------------------------

    def _fill(
        self, batch: HostBatch, rows: Sequence[SamplingRow], shaped: Mapping[int, Entries], size: int, *, planned: bool
    ) -> None:
        """Write the inputs, padded to `size` tokens, and send them on their way."""
        host, count, sequences = self._inputs.host(), batch.num_tokens, batch.num_sequences
        for name, values, padding in (
            ("token_ids", batch.token_ids, 0), ("positions", batch.positions, 0), ("slots", batch.slots, -1),
        ):  # fmt: skip
            host[name][:count] = values
            host[name][count:size] = padding
        host["contexts"][:sequences] = batch.contexts
        host["contexts"][sequences:size] = 0
        batch.pad_tables(host["tables"])
        if rows:
            host["logits_at"][: len(rows)] = batch.logits_at
            host["logits_at"][len(rows) : next_size(self._row_sizes, len(rows))] = 0
            host["temperatures"][: len(rows)] = [row.params.temperature if row.draws else 0.0 for row in rows]
            host["seeds"][: len(rows)] = [row.draw_seed for row in rows]
            host["draws"][: len(rows)] = [row.output_len for row in rows]
        if shaped:
            fill_shapes(host, rows, shaped, next_size(self._row_sizes, len(rows)))
        if planned:
            self._pieces.attention.plan(batch, host, size)
        self._inputs.upload(sequences, int(batch.block_counts.max(initial=0)), shapes=bool(shaped))

    def _decode_size(self, rows: int, rung: Rung | None) -> int:
        """What a batch of decodes is padded to."""
        if self._graphs is None:
            return rows
        return next_size(self._batch_sizes if rung == "full" else self._row_sizes, rows)

    def _decode(self, size: int, rung: Rung | None) -> None:
        """A step of decodes with all layers at `rung`, or at several (None)."""
        pieces, layers = self._pieces, self._swapper.layers
        if rung is not None:
            self._run((size, rung), pieces.decode_step, size, layers)
            return
        self._run((size, "embed"), pieces.embed, size)
        for layer in layers:
            self._run((size, layer.layer, layer.rung), pieces.decode_layer, size, layer)
        self._run((size, "head"), pieces.head, size)

    def _step(self, size: int, rung: Rung | None, usual: bool, rows: int) -> None:
        """Any other step, padded to `size` tokens, with logits of `rows` rows.

        It comes in one piece if all layers are at `rung` and it finds place in the usual room; if `rung` is None, layer
        by layer: in the usual room if it is `usual` and such layers are captured, else in the largest.
        """
        pieces, layers = self._pieces, self._swapper.layers
        last = layers[-1]
        if rung is not None:
            self._run(("step", size, rung), pieces.step, size, pieces.attention.rooms(size)[0], layers)
        else:
            room = self._layer_rooms(size)[0 if usual else -1]
            self._run(("step", size, "embed"), pieces.embed, size)
            for layer in layers[:-1]:
                self._run(("step", size, room, layer.layer, layer.rung), pieces.layer, size, room, layer)
            self._run(("step", size, room, "last", last.rung), pieces.last_attention, size, room, last)
        if rows:
            padded = next_size(self._row_sizes, rows)
            self._run(("tail", padded, last.rung), pieces.tail, padded, last)

    def _layer_rooms(self, size: int) -> tuple[Room, ...]:
        """The rooms in which a step of `size` tokens comes layer by layer; the last one holds any."""
        rooms = self._pieces.attention.rooms(size)
        return rooms if size in self._roomy_steps else rooms[-1:]

    def _run(self, key: tuple[object, ...], piece: Callable[..., None], *arguments: Any) -> None:
        """A piece of a step, out of its graph where there are graphs."""
        if self._graphs is None:
            piece(*arguments)
        else:
            self._graphs.replay(key)

    def _sample_special(self, rows: Sequence[SamplingRow], special: Sequence[int]) -> Sampled:
        """Sample the rows at the places `special` on the host; the others were drawn on the device, so that their
        company changes nothing. Waits for the device.
        """
        sampled, logits = self._pieces.sampled[: len(rows)], self._pieces.logits
        tokens: list[int] = sampled.tolist()
        found = self._sample(logits[torch.tensor(special, device=logits.device)], [rows[at] for at in special])
        for at, token in zip(special, found.tokens, strict=True):
            tokens[at] = token
        sampled.copy_(torch.tensor(tokens))
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

    # -- at start ------------------------------------------------------------------------------------------------

    def warm_up(self, layer: LayerWeights) -> None:
        """Run once what will be captured or launched, so that kernels are compiled and libraries have their workspaces.

        Args:
            layer: one layer at some rung, its slot mapped; it serves as the whole model.
        """
        pieces = self._pieces
        # One layer of each kind of attention stands for all: kernels differ by whether there is a window.
        windows = {bool(window): at for at, window in reversed(list(enumerate(pieces.decoder.windows)))}
        kinds = [replace(layer, layer=at) for at in windows.values()]
        with torch.inference_mode():
            for size in self._batch_sizes:
                self._nothing(size)
                pieces.embed(size)
                for kind in kinds:
                    pieces.decode_layer(size, kind)
                pieces.head(size)
            for size in self._step_sizes:
                self._nothing(size, planned=True)
                pieces.embed(size)
                for room in pieces.attention.rooms(size):
                    for kind in kinds:
                        pieces.layer(size, room, kind)
                        pieces.last_attention(size, room, kind)
            for rows in self._row_sizes:
                pieces.tail(rows, kinds[0])
                pieces.choose_shaped(rows)

    def rehearse(self) -> None:
        """Sample as only the host can, so that what it needs is there, in memory too."""
        batch = self._batch_sizes[-1]
        params = SamplingParams(temperature=1.0, top_p=0.9, top_k=20, min_p=0.01, logprobs=1)
        with torch.inference_mode():
            self._sample_special([SamplingRow(params, Blank()) for _ in range(batch)], range(batch))

    def capture(
        self, stream: torch.cuda.Stream, bind: Callable[[int, Rung], LayerWeights], rungs: Sequence[Rung]
    ) -> None:
        """Capture every graph. Nothing runs.

        Args:
            stream: to capture on.
            bind: a layer at a rung; its slot need not be mapped.
            rungs: full precision and those of the ladder.
        """
        if self._graphs is None:
            return
        pieces, count = self._pieces, len(self._swapper.layers)
        take = partial(self._graphs.capture, stream=stream)
        with torch.inference_mode():
            # The largest first: the pool then holds what the others need.
            for size in reversed(self._step_sizes):
                usual, coarse = pieces.attention.rooms(size)[0], size in self._coarse_steps
                for rung in rungs:
                    layers = [bind(layer, rung) for layer in range(count)]
                    take(("step", size, rung), work=partial(pieces.step, size, usual, layers))
                    for room in self._layer_rooms(size) if coarse else ():
                        for layer in layers[:-1]:
                            take(("step", size, room, layer.layer, rung), work=partial(pieces.layer, size, room, layer))
                        last = partial(pieces.last_attention, size, room, layers[-1])
                        take(("step", size, room, "last", rung), work=last)
                if coarse:
                    take(("step", size, "embed"), work=partial(pieces.embed, size))
            for size in reversed(self._batch_sizes):
                coarse = size in self._row_sizes
                for rung in rungs if coarse else rungs[:1]:
                    layers = [bind(layer, rung) for layer in range(count)]
                    take((size, rung), work=partial(pieces.decode_step, size, layers))
                    if coarse:
                        for layer in layers:
                            take((size, layer.layer, rung), work=partial(pieces.decode_layer, size, layer))
                        take(("tail", size, rung), work=partial(pieces.tail, size, layers[-1]))
                if coarse:
                    take((size, "embed"), work=partial(pieces.embed, size))
                    take((size, "head"), work=partial(pieces.head, size))
                    take(("shaped", size), work=partial(pieces.choose_shaped, size))

    def _nothing(self, size: int, *, planned: bool = False) -> None:
        """Inputs of padding alone: sequences that are not there, tokens that are stored nowhere."""
        host = self._inputs.host()
        for name, value in (("token_ids", 0), ("positions", 0), ("slots", -1), ("contexts", 0)):
            host[name][:size] = value
        host["temperatures"][:], host["logits_at"][:] = 1.0, 0
        fill_shapes(host, (), {}, len(host["temperatures"]))
        if planned:
            nothing, empty = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
            batch = HostBatch(nothing, nothing, nothing, empty, empty, empty, empty, nothing)
            self._pieces.attention.plan(batch, host, size)
        self._inputs.upload(min(size, len(self._pieces.sampled)), 0, shapes=True)
