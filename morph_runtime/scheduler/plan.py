"""What the scheduler has chosen for one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from morph_runtime.scheduler.request import Request


class ScheduledSlice(NamedTuple):
    """`length` tokens of a request from position `start` on; `samples` if its last token asks for the next one."""

    request: Request
    start: int
    length: int
    samples: bool


class ScoredPositions(NamedTuple):
    """Positions from `first` on, `length` of them, of the prompt in slice number `part`: their logits are scored."""

    part: int
    first: int
    length: int


@dataclass
class StepPlan:
    """What the next step runs. `rows` is the number of tokens whose logits it needs, at most `max_num_seqs`."""

    slices: list[ScheduledSlice] = field(default_factory=list)
    scored: list[ScoredPositions] = field(default_factory=list)
    rows: int = 0
    started: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    short_of_blocks: bool = False
    """Nobody further was admitted, for too few blocks are free."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(s.length for s in self.slices)
