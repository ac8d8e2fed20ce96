"""All requests that decode, as sums: what a run of n steps reads, takes and ends costs the same to know for any n.

Every decode step gives each of them one token. So one clock of steps dates everything: a request ends at a clock
that is known when it begins, and takes a KV block whenever the clock has one remainder modulo the block size.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple


class Member(NamedTuple):
    """A request as it began to decode: at `clock`, with `computed` tokens in the KV cache; it ends at clock `end`."""

    clock: int
    computed: int
    end: int


class Decodes:
    """Requests in lockstep, by key. The next step writes position `computed` of each."""

    def __init__(self, block_tokens: int) -> None:
        self._size = block_tokens
        self._clock = 0
        self._crossing = [0] * block_tokens
        """How many take a block at clocks of each remainder."""
        self._ends: list[tuple[int, int]] = []
        self._members: dict[int, Member] = {}
        self.context = 0
        """Tokens of KV that the next step reads, the ones that it writes included."""

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, key: int) -> bool:
        return key in self._members

    @property
    def keys(self) -> list[int]:
        """Who decodes, in no order."""
        return list(self._members)

    @property
    def steps_left(self) -> int:
        """Steps until the first of them ends; there is at least one."""
        while self._members.get(self._ends[0][1], (0, 0, -1))[2] != self._ends[0][0]:
            heapq.heappop(self._ends)  # was removed
        return self._ends[0][0] - self._clock

    def computed(self, key: int) -> int:
        """Tokens of a request that are in the KV cache."""
        member = self._members[key]
        return member.computed + self._clock - member.clock

    def left(self, key: int) -> int:
        """Steps until a request ends."""
        return self._members[key].end - self._clock

    def add(self, key: int, computed: int, steps: int) -> None:
        """A request decodes for `steps` steps from now on."""
        end = self._clock + steps
        self._members[key] = Member(self._clock, computed, end)
        heapq.heappush(self._ends, (end, key))
        self._crossing[(self._clock - computed) % self._size] += 1
        self.context += computed + 1

    def remove(self, key: int) -> int:
        """Take a request out; returns its tokens in the KV cache."""
        member = self._members.pop(key)
        computed = member.computed + self._clock - member.clock
        self._crossing[(member.clock - member.computed) % self._size] -= 1
        self.context -= computed + 1
        return computed

    def advance(self, steps: int) -> list[int]:
        """Run so many steps, at most `steps_left`; returns who has ended, the least key first."""
        self._clock += steps
        self.context += steps * len(self._members)
        ends = self._ends
        ended: list[int] = []
        while ends and ends[0][0] <= self._clock:
            end, key = heapq.heappop(ends)
            member = self._members.get(key)
            if member is not None and member.end == end and ended[-1:] != [key]:
                ended.append(key)  # once, if it was removed and has come back to the same end
        return ended

    def blocks(self, steps: int) -> int:
        """Blocks that the next `steps` steps take."""
        rounds, rest = divmod(steps, self._size)
        first = self._clock % self._size
        crossing = self._crossing
        last = first + rest
        part = sum(crossing[first:last]) + (sum(crossing[: last - self._size]) if last > self._size else 0)
        return rounds * len(self._members) + part

    def steps_within(self, blocks: int, most: int) -> int:
        """How many of the next `most` steps can run before they need more than `blocks` blocks."""
        if (most // self._size + 1) * len(self._members) <= blocks:
            return most
        steps = blocks // len(self._members) * self._size
        blocks -= steps // self._size * len(self._members)
        at = self._clock
        while steps < most:
            blocks -= self._crossing[at % self._size]
            if blocks < 0:
                break
            at += 1
            steps += 1
        return min(steps, most)

    def takers(self) -> list[int]:
        """Who takes a block in the next step, the least key first."""
        at, size = self._clock, self._size
        return sorted(key for key, member in self._members.items() if (member.clock - member.computed - at) % size == 0)
