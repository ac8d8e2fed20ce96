"""The first operation of a step: look up the embeddings of its tokens, some of which only the device knows."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from morph_runtime.kernels.cuda.jit import kernel, power_of_two

TILE = 2048
"""Values per program."""


@kernel
def _embed(
    ids: tl.tensor,
    sampled: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    token = tl.load(ids + row)
    if token < 0:
        token = tl.load(sampled - 1 - token)
    tl.store(out + row * width + columns, tl.load(table + token * width + columns, mask=inside), mask=inside)


def embed(
    ids: Tensor,  # int64 [T]
    sampled: Tensor,  # int64 [>= rows of the step before]
    table: Tensor,  # [vocab, hidden], contiguous
    out: Tensor,  # [T, hidden], contiguous
) -> None:
    """Write the embedding of each token; an id -1 - row stands for what the step before sampled in that row.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, width = out.shape
    if ids.shape != (rows,) or table.shape[1] != width or not (out.is_contiguous() and table.is_contiguous()):
        raise ValueError(f"{tuple(ids.shape)} tokens of {tuple(table.shape)} embeddings do not make {tuple(out.shape)}")
    block = min(TILE, power_of_two(width))
    _embed[(rows, -(-width // block))](ids, sampled, table, out, width, block, num_warps=4)
