"""One step: which tokens of which sequences, and where their KV goes; as the host plans it, and as the CPU runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morph_runtime.errors import IntegrityError


@dataclass(frozen=True)
class HostBatch:
    """One step as the host plans it: plain arrays, none of which anybody changes later.

    A token that the previous step samples and the host has not seen yet stands here as -1 - row, where
    row is its place among the rows which that step samples.
    """

    token_ids: NDArray[np.int64]
    """[T]; negative: see above"""
    positions: NDArray[np.int64]
    """[T], from 0"""
    slots: NDArray[np.int64]
    """[T]: block * block_tokens + offset, where each token's K and V are written"""
    lengths: NDArray[np.int32]
    """[S]: tokens of each sequence, 1 for a decode; they are contiguous, in order, at the end of its context"""
    contexts: NDArray[np.int32]
    """[S]: tokens of each sequence in the KV cache after this step, its own included"""
    blocks: NDArray[np.int32]
    """[sum of block_counts]: the block tables, one after the other; more than a context needs is fine"""
    block_counts: NDArray[np.int32]
    """[S]: blocks of each table"""
    logits_at: NDArray[np.int64]
    """[R]: indices of tokens whose logits are wanted, in any order; may be empty"""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.lengths)

    @property
    def all_decodes(self) -> bool:
        """Each sequence has one token."""
        return len(self.token_ids) == len(self.lengths)

    def known_ids(self, previous: Sequence[int]) -> NDArray[np.int64]:
        """The token ids [T] with those filled in which the previous step sampled (`previous`, by row)."""
        unknown = self.token_ids < 0
        if not unknown.any():
            return self.token_ids
        ids = self.token_ids.copy()
        ids[unknown] = np.array(previous, dtype=np.int64)[-1 - ids[unknown]]
        return ids

    def pad_tables(self, out: NDArray[np.int32]) -> None:
        """Write the block tables into the rows of `out` [at least S, at least the longest table]; the rest stays."""
        columns = np.arange(int(self.block_counts.max(initial=0)), dtype=np.int32)
        rows = out[: self.num_sequences, : len(columns)]
        rows[columns < self.block_counts[:, None]] = self.blocks


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
    """One step as the CPU's decoder runs it. The tokens of a sequence are contiguous, in order, at the end of its
    context."""

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


def step_batch(batch: HostBatch, previous: Sequence[int] = ()) -> StepBatch:
    """A planned step as the CPU's decoder runs it.

    Args:
        batch: the plan.
        previous: what the step before sampled, by row; needed only for tokens that the plan does not know.
    """
    lengths = batch.lengths.tolist()
    ends = np.cumsum(batch.block_counts)
    starts = (np.cumsum(batch.lengths) - batch.lengths).tolist()
    blocks = batch.blocks.tolist()
    return StepBatch(
        token_ids=torch.from_numpy(batch.known_ids(previous)),
        positions=torch.from_numpy(batch.positions),
        slots=torch.from_numpy(batch.slots),
        sequences=list(map(SequenceSlice, starts, lengths, batch.contexts.tolist())),
        block_tables=[blocks[end - n : end] for end, n in zip(ends.tolist(), batch.block_counts.tolist(), strict=True)],
        logits_at=torch.from_numpy(batch.logits_at),
    )


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
