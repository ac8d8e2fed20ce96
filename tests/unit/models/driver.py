"""Drives a decoder over several sequences with a plain KV cache and scattered blocks, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from morph_runtime.models.batch import SequenceSlice, StepBatch, check_batch
from morph_runtime.models.decoder import Decoder
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.spec import ModelSpec


class PlainKV:
    """A KV cache of two tensors; blocks never handed out hold NaN, as unmapped memory might."""

    def __init__(self, spec: ModelSpec, blocks: int, block_tokens: int, dtype: torch.dtype) -> None:
        shape = (spec.layers, blocks, block_tokens, spec.kv_heads, spec.head_dim)
        self._k, self._v = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
        self.blocks, self.block_tokens = blocks, block_tokens

    def k(self, layer: int) -> Tensor:
        return self._k[layer]

    def v(self, layer: int) -> Tensor:
        return self._v[layer]


@dataclass
class Run:
    """One sequence on its way."""

    prompt: list[int]
    wanted: int
    chunk: int
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    done: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.tokens) == self.wanted

    def next_tokens(self) -> list[int]:
        """What the next step gets of it."""
        known = self.prompt + self.tokens
        return known[self.done : min(len(known), self.done + self.chunk)]


class Driver:
    """Steps of chunked prefill mixed with decodes; blocks are taken in a shuffled order."""

    def __init__(self, decoder: Decoder, kv: PlainKV, spec: ModelSpec, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._free = torch.randperm(kv.blocks, generator=generator).tolist()
        self._decoder, self._kv, self._spec = decoder, kv, spec

    def batch(self, runs: Sequence[Run]) -> StepBatch:
        """The next tokens of every run."""
        size = self._kv.block_tokens
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        parts, tables, wanted = [], [], []
        for run in runs:
            new = run.next_tokens()
            while len(run.blocks) * size < run.done + len(new):
                run.blocks.append(self._free.pop())
            parts.append(SequenceSlice(len(ids), len(new), run.done + len(new)))
            tables.append(run.blocks)
            for position in range(run.done, run.done + len(new)):
                positions.append(position)
                slots.append(run.blocks[position // size] * size + position % size)
            ids += new
            if run.done + len(new) == len(run.prompt) + len(run.tokens):
                wanted.append(len(ids) - 1)
        as_tensor = [torch.tensor(values, dtype=torch.int64) for values in (ids, positions, slots, wanted)]
        return StepBatch(as_tensor[0], as_tensor[1], as_tensor[2], parts, tables, as_tensor[3])

    def step(self, runs: Sequence[Run], layers: Sequence[LayerWeights]) -> None:
        """One forward and greedy sampling."""
        runs = [run for run in runs if not run.finished]
        batch = self.batch(runs)
        check_batch(batch, self._kv.block_tokens, 10**6, self._spec.vocab, self._kv.blocks)
        logits = iter(self._decoder.forward(batch, layers))
        for run, part in zip(runs, batch.sequences, strict=True):
            run.done = part.context
            if run.done == len(run.prompt) + len(run.tokens):
                run.logits.append(next(logits))
                run.tokens.append(int(run.logits[-1].argmax()))

    def finish(self, runs: Sequence[Run], layers: Sequence[LayerWeights], arrive_every: int = 2) -> None:
        """Run all to their end; a further one joins every `arrive_every` steps."""
        steps = 0
        while not all(run.finished for run in runs):
            self.step(runs[: 1 + steps // arrive_every], layers)
            steps += 1
