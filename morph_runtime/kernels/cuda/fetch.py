"""Fetching a step's inputs from pinned host memory, by a kernel.

A copy engine works off its queue in order, so a copy of some kilobytes waits for the hundreds of megabytes that an
up-shift has put before it. A kernel reads the host's memory itself and waits for nothing.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from morph_runtime.kernels.cuda.jit import kernel_with_varying

TILE = 1024
"""Words per program."""


@kernel_with_varying(["words"])
def _fetch(source: tl.tensor, target: tl.tensor, words: tl.tensor, row_words: tl.tensor, BLOCK: tl.constexpr) -> None:
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * row_words + column
    inside = column < words
    tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)


def fetch(source: Tensor, target: Tensor, words: int) -> None:
    """Copy the first words of each row.

    Args:
        source: int32, or another type whose elements count as words, [rows, row_words], contiguous, in pinned host
            memory or on the GPU.
        target: as `source`, on the GPU.
        words: of each row.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, row_words = source.shape
    if target.shape != source.shape or not (source.is_contiguous() and target.is_contiguous()) or words > row_words:
        raise ValueError(f"{words} words of {tuple(source.shape)} cannot go to {tuple(target.shape)}")
    _fetch[(rows, -(-words // TILE))](source, target, words, row_words, TILE, num_warps=4)


def copy_by_kernel(source: Tensor, target: Tensor) -> None:
    """Copy a small contiguous tensor to one of its shape and type on the GPU, bit for bit.

    For CUDA graphs, in which this is two addresses. The driver may look up the memory behind those of a plain copy
    when the graph is made, and a slot's memory comes and goes.

    Raises:
        ValueError: shapes or types differ.
    """
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(f"{tuple(source.shape)} of {source.dtype} cannot go to {tuple(target.shape)} {target.dtype}")
    fetch(source.view(1, -1), target.view(1, -1), source.numel())
