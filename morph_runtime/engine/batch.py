"""From the scheduler's plan to the tensors of a step."""

from __future__ import annotations

import torch

from morph_runtime.models.batch import SequenceSlice, StepBatch
from morph_runtime.scheduler import Request, StepPlan


def make_batch(plan: StepPlan, block_tokens: int) -> tuple[StepBatch, list[Request]]:
    """The tensors of a step, and the requests whose next token its logits give, in row order."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sequences: list[SequenceSlice] = []
    logits_at: list[int] = []
    sampling: list[Request] = []
    for request, start, length, samples in plan.slices:
        stop = start + length
        sequences.append(SequenceSlice(len(token_ids), length, stop))
        blocks = request.blocks
        if length == 1:  # most are decodes
            token_ids.append(request.tokens[start])
            positions.append(start)
            slots.append(blocks[start // block_tokens] * block_tokens + start % block_tokens)
        else:
            token_ids.extend(request.tokens[start:stop])
            positions.extend(range(start, stop))
            slots.extend(blocks[p // block_tokens] * block_tokens + p % block_tokens for p in range(start, stop))
        if samples:
            logits_at.append(len(token_ids) - 1)
            sampling.append(request)
    batch = StepBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        sequences=sequences,
        block_tables=[part.request.blocks for part in plan.slices],
        logits_at=torch.tensor(logits_at, dtype=torch.int64),
    )
    return batch, sampling
