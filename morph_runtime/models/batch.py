"""The one argument of a forward pass: which tokens of which sequences, and where their KV goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from morph_runtime.errors import IntegrityError


class SequenceSlice(NamedTuple):
    """The tokens of one sequence in a step."""

    start: int
    """Index of the first of them in the step."""
    length: int
    """How many; 1 for a decode."""
    context: int
    """Tokens of the sequence in the KV cache after this step, these included."""


@dataclass
class StepBatch:
    """One step; all tensors on CPU. The tokens of a sequence are contiguous, in order, at the end of its context."""

    token_ids: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T], from 0"""
    slots: Tensor
    """int64 [T]: block * block_tokens + offset, where each token's K and V are written"""
    sequences: Sequence[SequenceSlice]
    """Each token belongs to exactly one."""
    block_tables: Sequence[Sequence[int]]
    """Per sequence: the blocks that hold its context, in order; more than it needs is fine."""
    logits_at: Tensor
    """int64 [S]: indices of tokens whose next token is wanted; may be empty"""


def check_batch(batch: StepBatch, block_tokens: int, max_positions: int, vocab: int, mapped_blocks: int) -> None:
    """Make sure that a batch holds together. Costs some tens of microseconds: for tests and the integrity check.

    Args:
        batch: the step.
        block_tokens: tokens per KV block.
        max_positions: tokens of the longest request.
        vocab: number of token ids.
        mapped_blocks: KV blocks that have memory.

    Raises:
        IntegrityError: it does not; the text says where.
    """
    tokens = batch.token_ids.shape[0]
    if len(batch.sequences) != len(batch.block_tables):
        raise IntegrityError(f"a step has {len(batch.sequences)} sequences and {len(batch.block_tables)} block tables")
    if batch.positions.shape[0] != tokens or batch.slots.shape[0] != tokens:
        raise IntegrityError(f"a step has {tokens} tokens, {len(batch.positions)} positions, {len(batch.slots)} slots")
    ids, positions, slots = batch.token_ids.tolist(), batch.positions.tolist(), batch.slots.tolist()
    covered = 0
    for number, (part, table) in enumerate(zip(batch.sequences, batch.block_tables, strict=True)):
        if part.start != covered or part.length < 1 or part.context < part.length:
            raise IntegrityError(f"sequence {number} of a step is {part}, after {covered} tokens")
        covered += part.length
        if covered > tokens or part.context > max_positions or part.context > len(table) * block_tokens:
            raise IntegrityError(f"sequence {number} of a step is {part}, with {len(table)} blocks")
        if any(not 0 <= block < mapped_blocks for block in table):
            raise IntegrityError(f"sequence {number} of a step has a block outside 0..{mapped_blocks - 1}: {table}")
        for index in range(part.start, covered):
            position = part.context - part.length + index - part.start
            slot = table[position // block_tokens] * block_tokens + position % block_tokens
            if positions[index] != position or slots[index] != slot:
                raise IntegrityError(f"token {index} of a step has a wrong position or slot, of sequence {number}")
    if covered != tokens:
        raise IntegrityError(f"a step of {tokens} tokens has sequences over {covered}")
    if any(not 0 <= i < vocab for i in ids) or any(not 0 <= i < tokens for i in batch.logits_at.tolist()):
        raise IntegrityError(f"a step has a token id outside 0..{vocab - 1}, or wants logits of a token it has not")
