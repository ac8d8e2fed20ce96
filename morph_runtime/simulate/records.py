"""What became of each request, and what the engine did from step to step."""

from __future__ import annotations

import math
from typing import NamedTuple


class Span(NamedTuple):
    """One step, or a run of equal ones.

    Attributes:
        begin_s, end_s: when.
        level: at which it ran.
        tokens: output tokens of it.
        prefill: prompt tokens of it; recomputed ones count too.
        running: requests that hold blocks when it is over.
        backlog: requests that wait though a step has just been chosen: for blocks, sequences, budget or a credit.
        used, capacity: KV blocks.
    """

    begin_s: float
    end_s: float
    level: int
    tokens: int
    prefill: int
    running: int
    backlog: int
    used: int
    capacity: int


class Records:
    """Requests by key, 0, 1, … in order of arrival. Times that have not come are NaN."""

    def __init__(self) -> None:
        self.arrival_s: list[float] = []
        self.prompt: list[int] = []
        self.output: list[int] = []
        self.produced: list[int] = []
        """Output tokens so far; of a request that decodes, those before it began to."""
        self.start_s: list[float] = []
        self.first_s: list[float] = []
        self.last_s: list[float] = []
        self.preemptions: list[int] = []
        self.begun: list[int] = []
        """Those whose first token is there, in that order."""
        self.ended: list[int] = []
        """Those whose last token is there, in that order."""
        self.spans: list[Span] = []

    def __len__(self) -> int:
        return len(self.arrival_s)

    def add(self, arrival_s: float, prompt: int, output: int) -> int:
        """A new request; returns its key."""
        self.arrival_s.append(arrival_s)
        self.prompt.append(prompt)
        self.output.append(output)
        self.produced.append(0)
        for times in (self.start_s, self.first_s, self.last_s):
            times.append(math.nan)
        self.preemptions.append(0)
        return len(self.arrival_s) - 1

    def known(self, key: int) -> int:
        """Tokens of a request that waits or prefills: its prompt, and its output before a preemption."""
        return self.prompt[key] + self.produced[key]

    def start(self, key: int, at_s: float) -> bool:
        """A request is admitted; True if it never was before."""
        if not math.isnan(self.start_s[key]):
            return False
        self.start_s[key] = at_s
        return True

    def sample(self, key: int, at_s: float) -> int:
        """The end of a prefill gives a token; returns how many are still to come."""
        self.produced[key] += 1
        if math.isnan(self.first_s[key]):
            self.first_s[key] = at_s
            self.begun.append(key)
        return self.output[key] - self.produced[key]

    def preempted(self, key: int, left: int | None) -> None:
        """A request has lost its blocks; `left` tokens were to come if it decoded."""
        self.preemptions[key] += 1
        if left is not None:
            self.produced[key] = self.output[key] - left

    def end(self, key: int, at_s: float) -> None:
        """All tokens are out."""
        self.produced[key] = self.output[key]
        self.last_s[key] = at_s
        self.ended.append(key)
