"""Attention of a step of any make-up: its single tokens go to the decode kernel, its chunks to the prefill kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from morph_runtime.kernels.attention import AttentionShape, Slice
from morph_runtime.kernels.cuda.attention_decode import (
    decode,
    decode_splits,
    decode_workspace_floats,
)
from morph_runtime.kernels.cuda.attention_prefill import prefill, prefill_tiles, tile_tokens


@dataclass(frozen=True)
class StepPlan:
    """What all layers of a step share that see as far; int32 tensors on the device."""

    tables: Tensor
    """[S, blocks of the longest context]"""
    starts: Tensor
    """[S + 1]: where each sequence's tokens start in the step, and the end."""
    contexts: Tensor
    """[S]: tokens in the cache, the step's own included."""
    picks: Tensor
    """[decodes, 2]: sequence and row of each sequence with one token."""
    tiles: Tensor
    """[tiles, 2]: see `prefill_tiles`."""
    splits: int
    """Parts that the decodes' contexts are cut into."""
    window: int
    """Tokens that a query sees, its own included; 0: all."""


class StepAttention:
    """Plans a step once, then attends in each layer. For steps outside of captured graphs; one thread at a time."""

    def __init__(
        self,
        shape: AttentionShape,
        dtype: torch.dtype,
        max_sequences: int,
        device: torch.device,
        scale: float | None = None,
    ) -> None:
        """Allocate the workspace.

        Args:
            shape: of the model.
            dtype: of queries and outputs.
            max_sequences: of one step.
            device: where the kernels run.
            scale: of the scores; None: head_dim ** -0.5.

        Raises:
            ValueError: the kernels do not take so many heads per KV head.
        """
        self._shape = shape
        self._scale = shape.head_dim**-0.5 if scale is None else scale
        self._device = device
        self._tile_tokens = tile_tokens(shape.heads, shape.kv_heads, shape.head_dim, dtype.itemsize)
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        )
        floats = [
            decode_workspace_floats(count, shape.heads, shape.head_dim, self._splits(count))
            for count in range(1, max_sequences + 1)
        ]
        self._workspace = torch.empty(max(floats), dtype=torch.float32, device=device)

    @property
    def workspace_bytes(self) -> int:
        """Memory that it holds for life."""
        return self._workspace.nbytes

    def _splits(self, count: int) -> int:
        return decode_splits(count, self._shape.kv_heads, self._shape.max_context, self._processors)

    def plan(self, sequences: Sequence[Slice], block_tables: Sequence[Sequence[int]], window: int = 0) -> StepPlan:
        """Lay a step out and send it to the device, in one copy that the host does not wait for.

        Args:
            sequences: the tokens of the step, in order.
            block_tables: per sequence, the blocks of its context in order; more than it needs is fine.
            window: tokens that a query sees, its own included; 0: all before it.
        """
        count = len(sequences)
        needs = [-(-part.context // self._shape.block_tokens) for part in sequences]
        width = max(needs, default=0)
        picks = [(number, part.start) for number, part in enumerate(sequences) if part.length == 1]
        chunks = [(number, part.length) for number, part in enumerate(sequences) if part.length > 1]
        tiles = prefill_tiles(chunks, self._tile_tokens)
        end = sequences[-1].start + sequences[-1].length if sequences else 0
        numbers: list[int] = []
        for table, need in zip(block_tables, needs, strict=True):
            numbers += table[:need]
            numbers += [-1] * (width - need)
        numbers += [part.start for part in sequences]
        numbers.append(end)
        numbers += [part.context for part in sequences]
        numbers += [number for pair in picks for number in pair]
        numbers += [number for pair in tiles for number in pair]
        host = torch.tensor(numbers, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        sizes = [count * width, count + 1, count, 2 * len(picks), 2 * len(tiles)]
        tables, starts, contexts, picked, tiled = host.to(self._device, non_blocking=True).split_with_sizes(sizes)
        return StepPlan(
            tables.view(count, width),
            starts,
            contexts,
            picked.view(-1, 2),
            tiled.view(-1, 2),
            self._splits(len(picks)),
            window,
        )

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: StepPlan) -> Tensor:
        """Attend to what is stored, the step's own tokens included.

        Args:
            q: [T, heads, head_dim], rotated; the last two dimensions contiguous, rows of any stride.
            k_cache: [blocks, block_tokens, kv_heads, head_dim]: the layer's; any strides but the last.
            v_cache: as `k_cache`, same strides.
            plan: of this step.

        Returns:
            [T, heads * head_dim], contiguous.
        """
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        if plan.picks.shape[0]:
            decode(
                q, k_cache, v_cache, plan.tables, plan.contexts, out, self._workspace,
                splits=plan.splits, scale=self._scale, window=plan.window, picks=plan.picks,
            )  # fmt: skip
        if plan.tiles.shape[0]:
            prefill(
                q, k_cache, v_cache, plan.tables, plan.starts, plan.contexts, plan.tiles, out,
                scale=self._scale, window=plan.window,
            )  # fmt: skip
        return out
