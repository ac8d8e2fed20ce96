"""The attention of a step on a GPU: decodes by one kernel, prefill chunks by another, over the step's inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morph_runtime.engine.cuda_inputs import StepInputs
from morph_runtime.kernels.attention import PagedKV
from morph_runtime.kernels.cuda.attention_decode import decode, decode_splits, decode_workspace_floats
from morph_runtime.kernels.cuda.attention_prefill import prefill, prefill_tiles, tile_tokens
from morph_runtime.models.batch import HostBatch
from morph_runtime.models.cuda_decoder import Attend
from morph_runtime.weights.spec import ModelSpec


class StepAttention:
    """Knows the cache, the inputs' static tensors, and the plan of the present mixed step."""

    def __init__(self, spec: ModelSpec, kv: PagedKV, inputs: StepInputs, max_context: int, dtype: torch.dtype) -> None:
        """Allocate the workspace that split decodes need.

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
        sequences = inputs.tensors["contexts"].shape[0]
        floats = max(
            decode_workspace_floats(rows, spec.heads, spec.head_dim, self._splits(rows))
            for rows in range(1, sequences + 1)
        )
        self._workspace = torch.empty(max(floats, 1), dtype=torch.float32, device=device)
        self._num_decodes = self._num_tiles = self._num_sequences = 0

    def plan(self, batch: HostBatch, host: dict[str, NDArray[Any]]) -> None:
        """Write what a mixed step needs besides the tables: starts, picks of the decodes, tiles of the chunks."""
        lengths = batch.lengths
        ends = np.cumsum(lengths, dtype=np.int32)
        sequences = len(lengths)
        host["starts"][0] = 0
        host["starts"][1 : sequences + 1] = ends
        decodes = np.flatnonzero(lengths == 1)
        host["picks"][: len(decodes), 0] = decodes
        host["picks"][: len(decodes), 1] = ends[decodes] - 1
        chunks = [(int(i), int(lengths[i])) for i in np.flatnonzero(lengths > 1)]
        tiles = prefill_tiles(chunks, self._tile_tokens)
        if tiles:
            host["tiles"][: len(tiles)] = tiles
        self._num_decodes, self._num_tiles, self._num_sequences = len(decodes), len(tiles), sequences

    def decodes(self, rows: int) -> Attend:
        """The attention of a step of `rows` decodes, padding included; can be captured."""
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

    def mixed(self, q: Tensor, layer: int, window: int) -> Tensor:
        """The attention of the step that was planned last."""
        tensors = self._inputs.tensors
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        tables, contexts = tensors["tables"][: self._num_sequences], tensors["contexts"][: self._num_sequences]
        k_cache, v_cache = self._k[layer], self._v[layer]
        if self._num_decodes:
            decode(
                q, k_cache, v_cache, tables, contexts, out, self._workspace,
                splits=self._splits(self._num_decodes), scale=self._scale, window=window,
                picks=tensors["picks"][: self._num_decodes],
            )  # fmt: skip
        if self._num_tiles:
            prefill(
                q, k_cache, v_cache, tables, tensors["starts"][: self._num_sequences + 1], contexts,
                tensors["tiles"][: self._num_tiles], out, scale=self._scale, window=window,
            )  # fmt: skip
        return out

    def _splits(self, rows: int) -> int:
        return decode_splits(rows, self._spec.kv_heads, self.max_context, self._processors)
