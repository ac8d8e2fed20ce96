"""The engine's own scheduler and block pool on a clock: slow, step by step, and what the simulator must agree with."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from morph_runtime.config import CacheSettings, SchedulerSettings
from morph_runtime.credits import CreditLimits, EngineNews, may_enter
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.kv import BlockPool
from morph_runtime.morph.costs import StepCosts, layer_counts, pairs_of
from morph_runtime.morph.levels import LevelPlan
from morph_runtime.scheduler import PrefixCache, Request, Scheduler, StepPlan
from morph_runtime.simulate.arrivals import Arrivals
from morph_runtime.simulate.engine_profile import EngineProfile
from morph_runtime.simulate.shifts import Shifts

LAYERS = 4


def tiny_profile(
    *, blocks: int = 12, block_tokens: int = 4, seqs: int = 4, batched: int = 16, line: int = 2, overlap: bool = False
) -> EngineProfile:
    """An engine of 4 layers whose numbers are no round ones, so that two events hardly ever coincide."""
    plan = LevelPlan(range(LAYERS), ("w8", "w4"))
    costs = StepCosts(
        rungs=("full", "w8", "w4"),
        tokens=np.array([1.0, 4.0, 16.0]),
        whole_s=np.array([[10.123, 12.731, 31.377], [7.919, 8.317, 17.913], [6.133, 9.971, 33.179]]) / 1000,
        context_s=2.137e-5,
        pair_s=1.931e-6,
        counts=layer_counts(plan),
        down_s=0.0213,
        up_s=0.0471,
    )
    capacities = np.array([blocks + 2 * level for level in range(plan.max_level + 1)])
    return EngineProfile(
        "tiny", costs, capacities, LAYERS, block_tokens, seqs, batched, line, 0.01, overlap, 2, 0.001237
    )


@dataclass
class Flight:
    """A launched step."""

    plan: StepPlan
    begin_s: float
    end_s: float


class Queue:
    """The outer queue: one request after the other gets its credit as soon as the rule lets it."""

    def __init__(self, profile: EngineProfile, arrivals: Arrivals) -> None:
        self.limits = CreditLimits(profile.line, profile.max_num_batched_tokens, profile.max_num_seqs)
        self.handoff_s = profile.handoff_s
        self.outside = deque(zip(arrivals.arrival_s.tolist(), arrivals.prompt_tokens.tolist(), strict=True))
        self.inside: deque[tuple[float, int]] = deque()
        self.count = 0
        self.held: dict[int, int] = {}
        self.news = EngineNews()
        self.told_s = self.last_entry = 0.0

    @property
    def next_entry_s(self) -> float:
        """Of an idle engine: nobody holds a credit, so the first outside gets one."""
        if self.inside:
            return self.inside[0][0]
        return max(self.outside[0][0], self.last_entry, self.told_s) + self.handoff_s if self.outside else float("inf")

    def hand_over(self, until: float, inclusive: bool) -> None:
        while self.outside:
            arrival, tokens = self.outside[0]
            at = max(arrival, self.last_entry, self.told_s)
            held = sum(self.held.values())
            if at > until or (at == until and not inclusive):
                return
            if not may_enter(self.limits, self.news, len(self.held), held, 1, tokens):
                return
            self.outside.popleft()
            self.held[self.count] = tokens
            self.last_entry = at + self.handoff_s
            self.inside.append((self.last_entry, self.count))
            self.count += 1


class Reference:
    """The engine's loop (`Engine.step`) over simulated time."""

    def __init__(self, profile: EngineProfile, level: int = 0, script: list[tuple[float, int]] | None = None) -> None:
        self.profile = profile
        settings = SchedulerSettings(
            profile.max_num_seqs, profile.max_num_batched_tokens, profile.watermark, profile.line
        )
        self.pool = BlockPool(int(profile.capacities[level]))
        prefix = PrefixCache(CacheSettings(prefix=False), self.pool, profile.block_tokens)
        longest = int(profile.capacities[0]) * profile.block_tokens
        self.scheduler = Scheduler(settings, self.pool, prefix, profile.block_tokens, longest, ())
        self.shifts = Shifts(profile.costs, profile.capacities.tolist(), profile.depth, level)
        self.script = deque(script or [])
        self.now = 0.0
        self.flight: Flight | None = None
        self.entered_s: list[float] = []
        self.first_s: dict[int, float] = {}
        self.last_s: dict[int, float] = {}

    def run(self, arrivals: Arrivals) -> None:
        """Serve everything."""
        profile = self.profile
        queue = Queue(profile, arrivals)
        unfinished = len(arrivals)
        while unfinished:
            self._shift()
            queue.hand_over(self.now, inclusive=True)
            while queue.inside and queue.inside[0][0] <= self.now:
                entered_s, key = queue.inside.popleft()
                self.entered_s.append(entered_s)
                self._add(key, arrivals)
            if self.flight is not None and self.scheduler.must_preempt:
                unfinished -= self._settle()
            plan = self.scheduler.schedule(self.shifts.level)
            launched = self._launch(plan) if plan.slices else None
            if launched is None and self.flight is None:
                events = [queue.next_entry_s]
                # An idle engine at level 0 has nothing to decide.
                events += [self.script[0][0]] if self.script and (self.shifts.level or self.shifts.busy) else []
                self.now = max(self.now, min([*events, self.shifts.next_s]))
            told = launched is not None or self.flight is not None
            unfinished -= self._settle()
            self.flight = launched
            if not profile.overlap:
                unfinished -= self._settle()
            if told:
                queue.hand_over(self.now, inclusive=False)
                for request in plan.started:
                    del queue.held[request.key]
                queue.news = EngineNews(self.scheduler.num_running, plan.short_of_blocks)
                queue.told_s = self.now
            self.scheduler.check_integrity()

    def _add(self, key: int, arrivals: Arrivals) -> None:
        prompt, output = int(arrivals.prompt_tokens[key]), int(arrivals.output_tokens[key])
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        self.scheduler.add(Request(key, [1] * prompt, prompt, sampling, arrival_s=float(key)))

    def _launch(self, plan: StepPlan) -> Flight:
        decodes = [s for s in plan.slices if s.length == 1 and s.request.is_decoding]
        prefills = [s for s in plan.slices if s not in decodes]
        seconds = self.profile.costs.step_s(
            self.shifts.level,
            len(decodes),
            sum(s.start + 1 for s in decodes),
            sum(s.length for s in prefills),
            sum(pairs_of(s.start, s.length) for s in prefills),
        )
        begin = max(self.now, self.flight.end_s if self.flight else 0.0)
        self.scheduler.advance(plan)
        return Flight(plan, begin, begin + float(seconds))

    def _settle(self) -> int:
        """Book the step in flight; returns how many requests it has ended."""
        flight, self.flight = self.flight, None
        if flight is None:
            return 0
        self.now = max(self.now, flight.end_s)
        sampling = [s.request for s in flight.plan.slices if s.samples]
        for request in sampling:
            self.first_s.setdefault(request.key, flight.end_s)
        ended = self.scheduler.resolve(flight.plan, [1] * len(sampling), self.shifts.level)
        for request, _ in ended:
            self.last_s[request.key] = flight.end_s
        return len(ended)

    def _shift(self) -> None:
        """Move the level, and the pool's capacity with it. Only where no step is in flight between steps."""
        shifts, pool = self.shifts, self.pool
        shifts.poll(self.now, pool.num_used, self.scheduler.num_running)
        if self.script and self.script[0][0] <= self.now:
            shifts.target = self.script.popleft()[1]
            shifts.poll(self.now, pool.num_used, self.scheduler.num_running)
        if shifts.capacity > pool.capacity:
            pool.grow(shifts.capacity)
        elif shifts.capacity < pool.capacity:
            pool.reserve_below(shifts.capacity)
            pairs = pool.plan_migration()
            self.scheduler.remap_blocks(dict(pairs))
            pool.commit_migration(pairs)
