from __future__ import annotations

import pytest
import torch

from kernels.cuda.oracle import attention, paged
from morph_runtime.kernels.attention import AttentionShape
from morph_runtime.kernels.cuda.attention_step import StepAttention
from morph_runtime.models.batch import SequenceSlice


@pytest.mark.parametrize(
    "parts",
    [[(1, 40), (20, 50), (1, 3), (33, 33)], [(1, 40), (1, 17)], [(70, 70)]],
    ids=["mixed", "decodes", "prompt"],
)
@pytest.mark.parametrize("window", [0, 16])
def test_a_step_of_decodes_and_chunks_agrees_with_dense_attention(parts: list[tuple[int, int]], window: int) -> None:
    shape = AttentionShape(8, 2, 16, 16, 512)
    cache = paged([context for _, context in parts], 2, 16, 16, torch.float32)
    starts = [sum(length for length, _ in parts[:index]) for index in range(len(parts) + 1)]
    slices = [SequenceSlice(start, *part) for start, part in zip(starts, parts, strict=False)]
    tables = [[block for block in row if block >= 0] + [7] for row in cache.tables.tolist()]
    q = torch.randn(starts[-1], 8, 16, generator=torch.Generator().manual_seed(1))
    step = StepAttention(shape, torch.float32, len(parts), torch.device("cpu"))

    out = step.run(q, cache.k, cache.v, step.plan(slices, tables, window))

    torch.testing.assert_close(out, attention(q, cache, starts, 0.25, window), atol=1e-5, rtol=1e-5)
    assert step.workspace_bytes > 0


def test_an_empty_step_gives_no_rows() -> None:
    cache = paged([4], 2, 16, 16, torch.float32)
    step = StepAttention(AttentionShape(8, 2, 16, 16, 512), torch.float32, 1, torch.device("cpu"))
    assert step.run(torch.empty(0, 8, 16), cache.k, cache.v, step.plan([], [])).shape == (0, 128)
