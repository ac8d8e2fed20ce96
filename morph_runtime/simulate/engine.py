"""Continuous batching on a clock of its own: what `scheduler.Scheduler` does to requests, without tokens or blocks.

As there, a step serves all decodes, then prefills that have begun, then admits from the line in order of arrival, when
the blocks for all known tokens are free beyond the watermark; if a decode finds no block, the latest request loses its
own and is recomputed later. What differs: blocks are counted, not numbered, there is no prefix cache and no priority,
and a run of steps with nothing but decodes is one event (`Decodes`).

With `overlap` a step is chosen when the one before it begins, so it knows neither who came nor who ended since.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable

from morph_runtime.credits import CreditLimits, EngineNews
from morph_runtime.morph.costs import pairs_of
from morph_runtime.simulate.decodes import Decodes
from morph_runtime.simulate.engine_profile import EngineProfile
from morph_runtime.simulate.outer_queue import OuterQueue
from morph_runtime.simulate.records import Records, Span
from morph_runtime.simulate.shifts import Shifts

Decide = Callable[["SimulatedEngine"], None]
"""Looks at the engine and may set `shifts.target`."""


class SimulatedEngine:
    """One engine. `now_s` is when its next step can begin."""

    def __init__(
        self, profile: EngineProfile, level: int = 0, decide: Decide | None = None, interval_s: float = 0.05
    ) -> None:
        """`decide` is called at the first step boundary after each `interval_s`, unless there is nothing to decide."""
        self.profile = profile
        limits = CreditLimits(profile.line, profile.max_num_batched_tokens, profile.max_num_seqs)
        self.queue = OuterQueue(limits, profile.handoff_s)
        self.records = Records()
        self._capacities: list[int] = profile.capacities.tolist()
        self.shifts = Shifts(profile.costs, self._capacities, profile.depth, level)
        self.decodes = Decodes(profile.block_tokens)
        self.prefilling: list[int] = []
        self.waiting: list[int] = []
        """The engine's line, a heap."""
        self.computed: dict[int, int] = {}
        """Tokens in the KV cache, of those that prefill."""
        self.used = 0
        self.preemptions = 0
        self.now_s = 0.0
        self.steps = 0
        self.last_step_s = 0.0
        self.last_shape = (0, 0, 0, 0)
        """Of the last step: decodes, what they read, prompt tokens, and pairs, as `StepCosts.seconds` takes them."""
        self._decide = decide
        self._interval_s = interval_s
        self._next_decision_s = 0.0 if decide is not None else math.inf
        self._seen_s = -math.inf
        """With overlap: when the step before the next one began, if there was one."""
        self._releasing: list[int] = []
        """With overlap: tokens in the KV cache of each request that ended with the last step."""

    # -- from outside --------------------------------------------------------------------------------------------

    def submit(self, arrival_s: float, prompt: int, output: int) -> int:
        """A request comes to the outer queue at a time that must not fall; returns its key."""
        self.queue.arrive(arrival_s, prompt)
        return self.records.add(arrival_s, prompt, output)

    @property
    def idle(self) -> bool:
        """Nothing runs or waits inside the engine."""
        return not (len(self.decodes) or self.prefilling or self.waiting)

    @property
    def running(self) -> int:
        """Requests that hold blocks."""
        return len(self.decodes) + len(self.prefilling)

    @property
    def unfinished(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self.records) - len(self.records.ended)

    @property
    def free(self) -> int:
        """Blocks that the next step may take."""
        return self.shifts.capacity - self.used - sum(map(self.blocks_for, self._releasing))

    def run_until(self, until_s: float) -> None:
        """Run every step that begins before `until_s`."""
        while self.now_s < until_s:
            if self.idle and self.queue.next_entry_s > self._seen_s and self._is_quiet(until_s):
                return
            self._next(until_s)

    def plan_decision(self, at_s: float) -> None:
        """Have the next decision at another time than one interval after the last."""
        self._next_decision_s = at_s

    def fits(self, key: int) -> bool:
        """Whether a waiting request could be admitted now."""
        spare = int(self.profile.watermark * self.shifts.capacity) + 1 if self.running or self._releasing else 0
        return self.blocks_for(self.records.known(key)) + spare <= self.free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-tokens // self.profile.block_tokens)

    # -- the loop ------------------------------------------------------------------------------------------------

    def _is_quiet(self, until_s: float) -> bool:
        """With nothing to run, go to the next event; True if there is none before `until_s`."""
        event_s = self.queue.next_entry_s
        self._seen_s = -math.inf
        self._releasing.clear()
        if self.shifts.busy:
            event_s = min(event_s, self.shifts.next_s)
        if self.shifts.level or self.shifts.busy or self._next_decision_s <= self.now_s:
            event_s = min(event_s, self._next_decision_s)
        self.now_s = max(self.now_s, min(event_s, until_s))
        return self.now_s >= until_s

    def _next(self, until_s: float) -> None:
        """Do what is due at a boundary, then run a step, or as many as have no event between them."""
        now = self.now_s
        shifts = self.shifts
        if shifts.busy:
            shifts.poll(now, self.used, self.running)
        if now >= self._next_decision_s:
            self._next_decision_s = now + self._interval_s
            assert self._decide is not None
            self._decide(self)
            if shifts.busy:
                shifts.poll(now, self.used, self.running)
        for key in self.queue.take(min(now, self._seen_s) if self._seen_s > -math.inf else now):
            heapq.heappush(self.waiting, key)
        self._run(until_s, self._lacks_blocks and self._make_room())

    def _run(self, until_s: float, preempted: bool) -> None:
        taken = self.decodes.blocks(1)  # decodes come first
        self.used += taken
        budget = self.profile.max_num_batched_tokens - len(self.decodes)
        chunks: list[tuple[int, int, int]] = []  # key, start, length
        # The last token of a request that is recomputed counts as a decode and goes before other prefills.
        for key in sorted(self.prefilling, key=lambda key: not self._is_last_again(key, self.computed[key])):
            budget -= self._chunk(key, budget, chunks)
        started, short = ([], True) if preempted else self._admit(budget, chunks)
        if chunks:
            self._mixed_step(chunks, started, short)
        elif len(self.decodes):
            self._decode_steps(until_s, taken, short)
        elif self._seen_s > -math.inf:
            # Nothing is in flight any more: what came and ended meanwhile is known, and the engine looks again.
            self._report(self.now_s, [], short)
            self._seen_s = -math.inf
            self._releasing.clear()
        else:
            self.now_s = max(self.now_s, min(until_s, self._next_event_s()))

    def _chunk(self, key: int, budget: int, chunks: list[tuple[int, int, int]]) -> int:
        start = self.computed[key]
        length = min(self.records.known(key) - start, budget)
        if length > 0:
            chunks.append((key, start, length))
        return max(length, 0)

    def _is_last_again(self, key: int, start: int) -> bool:
        return self.records.produced[key] > 0 and start == self.records.known(key) - 1

    def _admit(self, budget: int, chunks: list[tuple[int, int, int]]) -> tuple[list[int], bool]:
        """Let waiting requests run as far as budget, sequences and blocks go; returns those that never ran before, and
        whether it was blocks that were too few."""
        started: list[int] = []
        most = self.profile.max_num_seqs - len(self._releasing)
        while budget > 0 and self.waiting and self.running < most:
            if not self.fits(self.waiting[0]):
                return started, True
            key = heapq.heappop(self.waiting)
            self.used += self.blocks_for(self.records.known(key))
            self.computed[key] = 0
            bisect.insort(self.prefilling, key)
            if self.records.start(key, self.now_s):
                started.append(key)
            budget -= self._chunk(key, budget, chunks)
        return started, False

    def _report(self, at_s: float, started: list[int], short: bool) -> None:
        """Tell what a step has to tell, if it is anything new."""
        if started or self._would_tell(short):
            self.queue.report(at_s, started, EngineNews(self.running, short))

    def _would_tell(self, short: bool) -> bool:
        news = self.queue.news
        return news.running != self.running or news.short_of_blocks != short

    def _mixed_step(self, chunks: list[tuple[int, int, int]], started: list[int], short: bool) -> None:
        """One step with prefill in it."""
        if self.profile.overlap:
            self._report(self.now_s, started, short)
        prefill = pairs = again = 0
        decodes, costs = self.decodes, self.profile.costs
        count, context = len(decodes), decodes.context
        for key, start, length in chunks:
            if self._is_last_again(key, start):
                again += 1
                context += start + 1
            else:
                prefill += length
                pairs += pairs_of(start, length)
        self.last_shape = (count + again, context, prefill, pairs)
        seconds = costs.seconds(self.shifts.level, *self.last_shape)
        end_s = self.now_s + seconds
        self.last_step_s = seconds
        self.steps += 1
        self._overlap(self.now_s)
        tokens = count
        ended = decodes.advance(1) if count else []
        for key in ended:
            self._end(key, decodes.remove(key), end_s)
        for key, start, length in chunks:
            self.computed[key] = known = start + length
            if known == self.records.known(key):
                tokens += 1
                self.prefilling.remove(key)
                del self.computed[key]
                left = self.records.sample(key, end_s)
                if left:
                    decodes.add(key, known, left)
                else:
                    self._end(key, known, end_s)
        if not self.profile.overlap:
            self._report(end_s, started, short)
        self._book(end_s, tokens, prefill)

    def _decode_steps(self, until_s: float, taken: int, short: bool) -> None:
        """Decode steps up to the next event: an end, an arrival, a decision, a shift, or a lack of blocks.

        `taken` blocks are those of the first of them.
        """
        if self.profile.overlap:
            self._report(self.now_s, [], short)
        decodes, costs = self.decodes, self.profile.costs
        count, context = len(decodes), decodes.context
        first = costs.seconds(self.shifts.level, count, context, 0, 0)
        # Attention's time is in proportion to what it reads, and each step reads a token more of each request.
        grow = costs.seconds(self.shifts.level, count, context + count, 0, 0) - first
        room = min(until_s, self._next_event_s()) - self.now_s
        # A step that tells something new may let a request in: the next event is known only after it.
        steps = 1 if self._releasing or self._would_tell(short) else decodes.steps_left
        if room < steps * first + grow * (steps * (steps - 1) // 2):
            steps = min(steps, _steps_to(room, first, grow))
        if steps > 1:
            steps = max(1, decodes.steps_within(self.free + taken, steps))
        before = first * (steps - 1) + grow * ((steps - 1) * (steps - 2) // 2)
        end_s = self.now_s + before + first + grow * (steps - 1)
        self.last_step_s = first + grow * (steps - 1)
        self.last_shape = (count, context + count * (steps - 1), 0, 0)
        self.steps += steps
        self._overlap(self.now_s + before)
        self.used += decodes.blocks(steps) - taken
        for key in decodes.advance(steps):
            self._end(key, decodes.remove(key), end_s)
        if not self.profile.overlap:
            self._report(end_s, [], short)
        self._book(end_s, steps * count, 0)

    def _next_event_s(self) -> float:
        return min(self.queue.next_entry_s, self._next_decision_s, self.shifts.next_s)

    def _overlap(self, begin_s: float) -> None:
        """The last of the steps that are about to be booked begins at `begin_s`."""
        if self.profile.overlap:
            self._seen_s = begin_s
            self._releasing.clear()

    def _end(self, key: int, computed: int, at_s: float) -> None:
        self.used -= self.blocks_for(computed)
        if self.profile.overlap:
            self._releasing.append(computed)
        self.records.end(key, at_s)

    def _book(self, end_s: float, tokens: int, prefill: int) -> None:
        waiting = len(self.waiting) + self.queue.blocked(self.now_s)
        shifts = self.shifts
        self.records.spans.append(
            Span(self.now_s, end_s, shifts.level, tokens, prefill, self.running, waiting, self.used, shifts.capacity)
        )
        self.now_s = end_s

    @property
    def _lacks_blocks(self) -> bool:
        """Whether the decodes need more blocks than are free. Those that have just ended count as if they went on."""
        full = sum(computed % self.profile.block_tokens == 0 for computed in self._releasing)
        return self.decodes.blocks(1) + full > self.free

    def _make_room(self) -> bool:
        """Preempt, the latest first, until each decode of the next step has its block; True if any was.

        With overlap, the step in flight is waited for first, so what has ended is free.
        """
        self._releasing.clear()
        before = self.preemptions
        free = self.free
        for key in self.decodes.takers():
            while key in self.decodes and free == 0:
                victim = max(max(self.decodes.keys, default=-1), self.prefilling[-1] if self.prefilling else -1)
                held = self._preempt(victim)
                free += held
            if key in self.decodes:
                free -= 1
        return self.preemptions > before

    def _preempt(self, key: int) -> int:
        """Take a request's blocks and put it back into the line; returns how many it held."""
        if key in self.decodes:
            left = self.decodes.left(key)
            held = self.blocks_for(self.decodes.remove(key))
            self.records.preempted(key, left)
        else:
            self.prefilling.remove(key)
            del self.computed[key]
            held = self.blocks_for(self.records.known(key))
            self.records.preempted(key, None)
        self.used -= held
        self.preemptions += 1
        heapq.heappush(self.waiting, key)
        return held


def _steps_to(seconds: float, first_s: float, grow_s: float) -> int:
    """The least number of steps, from 1, that last `seconds`; the first takes `first_s`, each next `grow_s` more."""
    if seconds <= first_s:
        return 1
    half = first_s - grow_s / 2
    if grow_s > 0:
        steps = math.ceil((math.sqrt(half * half + 2 * grow_s * seconds) - half) / grow_s)
    else:
        steps = math.ceil(seconds / first_s)
    return max(1, steps)
