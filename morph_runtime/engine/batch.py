"""From the scheduler's plan to the arrays of a step."""

from __future__ import annotations

import numpy as np

from morph_runtime.models.batch import HostBatch
from morph_runtime.scheduler import Request, StepPlan


def make_batch(plan: StepPlan, block_tokens: int) -> tuple[HostBatch, list[Request]]:
    """The arrays of a step, and the requests whose next token its logits give, in row order.

    The rows of positions that are scored come after those, in the order of `plan.scored`.
    The arrays are copies: block tables may change while the step runs.
    """
    slices = plan.slices
    starts = np.array([part.start for part in slices], dtype=np.int64)
    tables = [part.request.blocks for part in slices]
    blocks = np.frombuffer(b"".join(tables), dtype=np.int32)
    counts = np.array([len(table) for table in tables], dtype=np.int32)
    first_blocks = np.cumsum(counts) - counts  # int64 [S]: where each table begins in `blocks`
    if plan.num_tokens == len(slices):  # decodes alone, as most steps
        token_ids = np.array([request.tokens[start] for request, start, _, _ in slices], dtype=np.int64)
        lengths = np.ones(len(slices), dtype=np.int32)
        positions = starts
        last = np.arange(len(slices))
    else:
        ids: list[int] = []
        for request, start, length, _ in slices:
            ids += request.tokens[start : start + length]
        token_ids = np.array(ids, dtype=np.int64)
        lengths = np.array([part.length for part in slices], dtype=np.int32)
        last = np.cumsum(lengths, dtype=np.int64) - 1
        first = last + 1 - lengths
        positions = np.arange(len(ids)) - np.repeat(first - starts, lengths)
        first_blocks = np.repeat(first_blocks, lengths)
    slots = blocks[first_blocks + positions // block_tokens] * np.int64(block_tokens) + positions % block_tokens
    sampling = [part.request for part in slices if part.samples]
    logits_at = last if len(sampling) == len(slices) else last[[part.samples for part in slices]]
    if plan.scored:
        begins = last + 1 - lengths - starts  # int64 [S]: index of a sequence's token in the step, less its position
        scored = [np.arange(first, first + count) + begins[part] for part, first, count in plan.scored]
        logits_at = np.concatenate([logits_at, *scored])
    batch = HostBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        lengths=lengths,
        contexts=(starts + lengths).astype(np.int32),
        blocks=blocks,
        block_counts=counts,
        logits_at=logits_at,
    )
    return batch, sampling
