from __future__ import annotations

from typing import Any

import pytest
import torch

from morph_runtime.errors import IntegrityError
from morph_runtime.models.batch import SequenceSlice, StepBatch, check_batch

GOOD: dict[str, Any] = {
    "token_ids": torch.tensor([1, 2, 3, 9]),
    "positions": torch.tensor([3, 4, 5, 0]),
    "slots": torch.tensor([11, 4, 5, 12]),
    "sequences": [SequenceSlice(0, 3, 6), SequenceSlice(3, 1, 1)],
    "block_tables": [[2, 1], [3]],
    "logits_at": torch.tensor([2, 3]),
}


def check(**changes: Any) -> None:
    check_batch(StepBatch(**{**GOOD, **changes}), 4, 16, 10, 4)


def test_a_good_batch_passes() -> None:
    check()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"block_tables": [[2, 1]]}, "2 sequences and 1 block tables"),
        ({"positions": torch.tensor([3, 4, 5])}, "4 tokens, 3 positions, 4 slots"),
        ({"sequences": [SequenceSlice(0, 3, 6), SequenceSlice(2, 1, 1)]}, "sequence 1 of a step is .* after 3 tokens"),
        ({"sequences": [SequenceSlice(0, 3, 2), SequenceSlice(3, 1, 1)]}, "sequence 0 of a step"),
        ({"sequences": [SequenceSlice(0, 3, 9), SequenceSlice(3, 1, 1)]}, "sequence 0 of a step is .* with 2 blocks"),
        ({"sequences": [SequenceSlice(0, 3, 17), SequenceSlice(3, 1, 1)]}, "sequence 0 of a step"),
        ({"sequences": [SequenceSlice(0, 3, 6)], "block_tables": [[2, 1]]}, "4 tokens has sequences over 3"),
        ({"block_tables": [[2, 1], [4]]}, r"sequence 1 of a step has a block outside 0..3: \[4\]"),
        ({"positions": torch.tensor([3, 4, 6, 0])}, "token 2 of a step has a wrong position or slot, of sequence 0"),
        ({"slots": torch.tensor([11, 4, 5, 13])}, "token 3 of a step has a wrong position or slot, of sequence 1"),
        ({"token_ids": torch.tensor([1, 2, 3, 10])}, r"token id outside 0..9"),
        ({"logits_at": torch.tensor([4])}, "logits of a token it has not"),
    ],
)
def test_a_batch_that_does_not_hold_together_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        check(**changes)
