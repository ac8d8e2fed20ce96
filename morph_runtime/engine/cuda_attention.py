"""The attention of a step on a GPU: decodes by one kernel, prefill chunks by another, over the step's inputs.

What is launched depends on the step's padded size and its room alone; which sequences have how many tokens is read on
the device. So every step can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morph_runtime.engine.cuda_inputs import StepInputs
from morph_runtime.kernels.attention import PagedKV
from morph_runtime.kernels.cuda.attention_decode import decode, decode_splits, decode_workspace_floats
from morph_runtime.kernels.cuda.attention_prefill import most_tiles, prefill, prefill_tiles, tile_tokens
from morph_runtime.models.batch import HostBatch
from morph_runtime.models.cuda_decoder import Attend
from morph_runtime.weights.spec import ModelSpec


class Room(NamedTuple):
    """Places in a step's attention; a program looks at each, taken or not."""

    decodes: int
    """Sequences of one token."""
    chunks: int
    """Sequences of several."""


USUAL = Room(128, 32)
"""What most steps find place in. Layer by layer with places for 256 sequences, 2,048 tokens at W8 took 28.3 ms; in one
graph with this room 26.2 (Llama-3-8B on an H200)."""


def rooms(size: int, sequences: int) -> tuple[Room, ...]:
    """The one or two rooms that a step of `size` tokens comes in; the last one holds any of up to `sequences`."""
    fitted = [
        Room(min(room.decodes, size, sequences), min(room.chunks, size // 2, sequences))
        for room in (USUAL, Room(sequences, sequences))
    ]
    return tuple(dict.fromkeys(fitted))


class StepAttention:
    """Knows the cache and the inputs' static tensors."""

    def __init__(self, spec: ModelSpec, kv: PagedKV, inputs: StepInputs, max_context: int, dtype: torch.dtype) -> None:
        """Allocate the workspace that split decodes need, and the output.

        Args:
            spec: the model.
            kv: the cache.
            inputs: static buffers of a step.
            max_context: tokens of the longest request.
            dtype: of queries; the cache may have a smaller one.
        """
        self._spec, self._inputs, self.max_context = spec, inputs, max_context
        self._k = [kv.k(layer) for layer in range(spec.layers)]
        self._v = [kv.v(layer) for layer in range(spec.layers)]
        self._scale = spec.head_dim**-0.5
        device = inputs.tensors["tables"].device
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._tile_tokens = tile_tokens(spec.heads, spec.kv_heads, spec.head_dim, dtype.itemsize)
        self._sequences = inputs.tensors["contexts"].shape[0]
        floats = max(
            decode_workspace_floats(rows, spec.heads, spec.head_dim, self._splits(rows))
            for rows in range(1, self._sequences + 1)
        )
        self._workspace = torch.empty(max(floats, 1), dtype=torch.float32, device=device)
        tokens = inputs.tensors["token_ids"].shape[0]
        self.attended = torch.zeros(tokens, spec.heads * spec.head_dim, dtype=dtype, device=device)
        """[max tokens, heads * head_dim]: what `planned` wrote last; rows of no sequence hold anything finite"""

    def rooms(self, size: int) -> tuple[Room, ...]:
        """See `rooms`."""
        return rooms(size, self._sequences)

    @staticmethod
    def is_usual(batch: HostBatch) -> bool:
        """Whether a step finds place in the first of its rooms."""
        decodes = int(np.count_nonzero(batch.lengths == 1))
        return decodes <= USUAL.decodes and len(batch.lengths) - decodes <= USUAL.chunks

    def plan(self, batch: HostBatch, host: dict[str, NDArray[Any]], size: int) -> None:
        """Write what a step that is no batch of decodes needs besides the tables.

        Args:
            batch: the step.
            host: the inputs' arrays; starts, picks of the decodes and tiles of the chunks are written.
            size: tokens that the step is padded to.
        """
        lengths = batch.lengths
        ends = np.cumsum(lengths, dtype=np.int32)
        sequences = len(lengths)
        host["starts"][0] = 0
        host["starts"][1 : sequences + 1] = ends
        decodes = np.flatnonzero(lengths == 1)
        most = self.rooms(size)[-1]
        picks, tiles = host["picks"][: most.decodes], host["tiles"][: self._tiles(size, most)]
        picks[: len(decodes), 0] = decodes
        picks[: len(decodes), 1] = ends[decodes] - 1
        picks[len(decodes) :] = (0, -1)
        chunks = [(int(i), int(lengths[i])) for i in np.flatnonzero(lengths > 1)]
        listed = prefill_tiles(chunks, self._tile_tokens)
        if listed:
            tiles[: len(listed)] = listed
        tiles[len(listed) :] = (-1, 0)

    def decodes(self, rows: int) -> Attend:
        """The attention of a step of `rows` decodes, padding included."""
        tensors, splits = self._inputs.tensors, self._splits(rows)
        tables, contexts = tensors["tables"][:rows], tensors["contexts"][:rows]

        def attend(q: Tensor, layer: int, window: int) -> Tensor:
            out = torch.empty(rows, q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
            decode(
                q, self._k[layer], self._v[layer], tables, contexts, out, self._workspace,
                splits=splits, scale=self._scale, window=window,
            )  # fmt: skip
            return out

        return attend

    def planned(self, size: int, room: Room) -> Attend:
        """The attention of a step as `plan` has it, padded to `size` tokens; it writes `attended`."""
        tensors = self._inputs.tensors
        out = self.attended[:size]
        picks, tiles = tensors["picks"][: room.decodes], tensors["tiles"][: self._tiles(size, room)]
        splits = self._splits(room.decodes)

        def attend(q: Tensor, layer: int, window: int) -> Tensor:
            k_cache, v_cache = self._k[layer], self._v[layer]
            decode(
                q, k_cache, v_cache, tensors["tables"], tensors["contexts"], out, self._workspace,
                splits=splits, scale=self._scale, window=window, picks=picks,
            )  # fmt: skip
            prefill(
                q, k_cache, v_cache, tensors["tables"], tensors["starts"], tensors["contexts"], tiles, out,
                scale=self._scale, window=window,
            )  # fmt: skip
            return out

        return attend

    def _tiles(self, size: int, room: Room) -> int:
        return most_tiles(size, room.chunks, self._tile_tokens)

    def _splits(self, rows: int) -> int:
        return decode_splits(rows, self._spec.kv_heads, self.max_context, self._processors)
