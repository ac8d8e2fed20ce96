"""The scheduler under random load, preemption and a KV capacity that grows and shrinks while it runs.

A stand-in for the KV cache remembers what was written where: all tokens up to a position, and every level
that its keys and values depend on. So a wrong block table, a missed migration, a prefix that is not
the request's own, or one of a precision that `cache.reuse` forbids, shows as a wrong read.

With overlap, a step reads and writes only when it is resolved, after the next one was scheduled: so a block that is
freed, given away or offered to others too early shows too.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from morph_runtime.config import REUSES, CacheSettings, SchedulerSettings
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.kv import BlockPool, CannotShrink
from morph_runtime.scheduler import PrefixCache, Request, Scheduler, StepPlan

BLOCK_TOKENS = 4
BASE_BLOCKS = 12
MAX_MODEL_LEN = BLOCK_TOKENS * BASE_BLOCKS
EOS = 7
STEMS = ([1] * 24, [1] * 9 + [2] * 15)
"""Prompts begin with pieces of these, so that they share prefixes of many lengths."""


def next_token(tokens: list[int]) -> int:
    """A deterministic stand-in for the model: depends on every token so far."""
    return (sum(tokens) * 31 + len(tokens)) % 50


def reference_output(prompt: list[int], sampling: SamplingParams) -> list[int]:
    """What the request must produce, whatever happens around it."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        length = len(tokens) - len(prompt)
        if tokens[-1] == EOS and not sampling.ignore_eos and length >= sampling.min_tokens:
            break
        if length >= sampling.max_tokens or len(tokens) >= MAX_MODEL_LEN:
            break
    return tokens[len(prompt) :]


@dataclass
class Slice:
    """What a step does to one request, as the device knows it: a copy of its block table, unknown tokens < 0."""

    key: int
    tokens: list[int]
    start: int
    reused_from: int
    blocks: list[int]
    samples: bool


@dataclass
class Flight:
    plan: StepPlan
    slices: list[Slice]
    level: int


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        seqs=st.integers(1, 8), tokens=st.integers(8, 40), watermark=st.sampled_from([0.0, 0.1]),
        reuse=st.sampled_from([*REUSES, "off"]), overlap=st.booleans(),
    )  # fmt: skip
    def start(self, seqs: int, tokens: int, watermark: float, reuse: str, overlap: bool) -> None:
        self.settings = SchedulerSettings(max_num_seqs=seqs, max_num_batched_tokens=tokens, watermark=watermark)
        self.pool = BlockPool(BASE_BLOCKS)
        self.reuse = reuse
        cache = CacheSettings(prefix=False) if reuse == "off" else CacheSettings(reuse=reuse)
        prefix = PrefixCache(cache, self.pool, BLOCK_TOKENS)
        self.scheduler = Scheduler(self.settings, self.pool, prefix, BLOCK_TOKENS, MAX_MODEL_LEN, [EOS])
        self.level = 0
        # (block, offset) -> the tokens up to there, the levels that the content depends on
        self.kv: dict[tuple[int, int], tuple[list[int], frozenset[int]]] = {}
        self.computed: dict[int, int] = {}
        self.requests: dict[int, Request] = {}
        self.expected: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.key = 0
        self.overlap = overlap
        self.flight: Flight | None = None
        self.sampled: list[int] = []
        """By the step that was resolved last."""

    @rule(
        stem=st.sampled_from(STEMS),
        cut=st.sampled_from([8, 16, 24, 24, 24]),
        end=st.lists(st.integers(5, 6), max_size=3),
        max_tokens=st.integers(1, 18),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        priority=st.integers(0, 2),
    )
    def add(
        self, stem: list[int], cut: int, end: list[int], max_tokens: int, min_tokens: int, ignore_eos: bool,
        priority: int,
    ) -> None:  # fmt: skip
        prompt = stem[:cut] + end
        self.key += 1
        sampling = SamplingParams(max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), ignore_eos=ignore_eos)
        request = Request(self.key, list(prompt), len(prompt), sampling, priority, float(self.key))
        self.requests[self.key] = request
        self.expected[self.key] = reference_output(prompt, sampling)
        self.scheduler.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.requests)))
        cancelled = self.scheduler.cancel(key)
        assert (cancelled is None) == (key in self.ended)
        if cancelled is not None:
            told = self.expected[key][: cancelled.output_len]
            assert cancelled.tokens[cancelled.prompt_len :] == told, "what is not known yet is dropped"
        self.ended.setdefault(key, "cancelled")

    @rule(level=st.integers(0, 2))
    def shift_and_step(self, level: int) -> None:
        self.level = level
        self.step()

    def read(self, part: Slice, tokens: list[int], position: int) -> frozenset[int]:
        """The levels that the content of a request's position depends on; it must be of these very tokens."""
        written, levels = self.kv[part.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS]
        assert written == tokens[: position + 1]
        return levels

    def may_reuse(self, levels: frozenset[int], level: int) -> bool:
        at_least = max(levels) <= level
        return {"exact": levels == {level}, "at_least": at_least, "any": True, "off": False}[self.reuse]

    @rule()
    def step(self) -> None:
        if self.scheduler.must_preempt:
            self.settle()
        plan = self.scheduler.schedule(self.level)
        for request in plan.preempted:
            self.computed[request.key] = 0
        assert plan.num_tokens <= self.settings.max_num_batched_tokens
        assert len({s.request.key for s in plan.slices}) == len(plan.slices)
        slices = []
        for request, start, length, samples in plan.slices:
            assert length > 0, "the last token is computed, whatever is cached"
            reused_from = self.computed.get(request.key, 0)
            tokens = request.tokens[: start + length]
            slices.append(Slice(request.key, tokens, start, reused_from, list(request.blocks), samples))
            self.computed[request.key] = start + length
        launched = Flight(plan, slices, self.level) if slices else None
        if launched:
            self.scheduler.advance(plan)
        self.settle()
        self.flight = launched
        if not self.overlap:
            self.settle()

    def settle(self) -> None:
        """Do now what the step in flight was launched for, with the blocks and tokens that it was launched with."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        before, self.sampled = self.sampled, []
        for part in flight.slices:
            tokens = [token if token >= 0 else before[-1 - token] for token in part.tokens]
            for position in range(part.reused_from, part.start):
                assert self.may_reuse(self.read(part, tokens, position), flight.level)
            for position in range(part.start, len(tokens)):
                block = part.blocks[position // BLOCK_TOKENS]
                assert self.pool.holders(block) == 1, "a block that is written has one holder"
                assert not self.pool.is_kept(block), "a block that is written cannot be found yet"
                levels = self.read(part, tokens, position - 1) if position else frozenset()
                self.kv[block, position % BLOCK_TOKENS] = (tokens[: position + 1], levels | {flight.level})
            for position in range(len(tokens)):
                self.read(part, tokens, position)
            if part.samples:
                self.sampled.append(next_token(tokens))
        for request, reason in self.scheduler.resolve(flight.plan, self.sampled, flight.level):
            assert request.key not in self.ended
            self.ended[request.key] = reason
            assert request.tokens[request.prompt_len :] == self.expected[request.key]

    @rule(blocks=st.integers(1, 6))
    def grow(self, blocks: int) -> None:
        self.pool.grow(self.pool.capacity + blocks)

    @precondition(lambda self: self.pool.capacity > BASE_BLOCKS)
    @rule(blocks=st.integers(1, 6))
    def shrink(self, blocks: int) -> None:
        self.settle()  # as the engine does before blocks move
        capacity = self.pool.capacity
        used = self.pool.num_used
        smaller = max(BASE_BLOCKS, capacity - blocks)
        try:
            self.pool.reserve_below(smaller)
            pairs = self.pool.plan_migration()
        except CannotShrink:
            assert used > smaller
            assert self.pool.capacity == capacity
            return
        assert len(dict(pairs)) == len(pairs), "a block moves once, however many share it"
        for source, target in pairs:
            for offset in range(BLOCK_TOKENS):
                if (source, offset) in self.kv:
                    self.kv[target, offset] = self.kv.pop((source, offset))
        self.scheduler.remap_blocks(dict(pairs))
        self.pool.commit_migration(pairs)
        assert self.pool.num_used == used

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            self.scheduler.check_integrity()
            assert self.scheduler.num_running <= self.settings.max_num_seqs

    def teardown(self) -> None:
        """Whatever happened, everything that was not cancelled comes to its end, and all blocks come back."""
        if not hasattr(self, "pool"):
            return
        for _ in range(4000):
            if not (self.scheduler.num_running or self.scheduler.num_waiting):
                break
            self.step()
        self.settle()
        assert set(self.ended) == set(self.requests)
        assert self.pool.num_used == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedulerKeepsEveryRequest = SchedulerMachine.TestCase


def make(capacity: int, **limits: int) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(capacity)
    prefix = PrefixCache(CacheSettings(prefix=False), pool, BLOCK_TOKENS)
    settings_ = SchedulerSettings(**{"max_num_seqs": 8, "max_num_batched_tokens": 16, **limits})
    return Scheduler(settings_, pool, prefix, BLOCK_TOKENS, 1000, [EOS]), pool


def request(key: int, prompt: int, *, max_tokens: int = 8, priority: int = 1) -> Request:
    return Request(
        key, [1] * prompt, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), priority, float(key)
    )


def run_step(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    plan = scheduler.schedule(0)
    scheduler.advance(plan)
    scheduler.resolve(plan, [1 for part in plan.slices if part.samples], 0)
    return [(s.request.key, s.start, s.length) for s in plan.slices]


def test_a_long_prompt_is_cut_into_chunks_beside_decodes() -> None:
    scheduler, _ = make(100)
    scheduler.add(request(1, 4))
    run_step(scheduler)
    scheduler.add(request(2, 40))
    assert run_step(scheduler) == [(1, 4, 1), (2, 0, 15)]
    assert run_step(scheduler) == [(1, 5, 1), (2, 15, 15)]
    assert run_step(scheduler) == [(1, 6, 1), (2, 30, 10)]
    assert run_step(scheduler) == [(1, 7, 1), (2, 40, 1)]


def test_the_urgent_request_is_admitted_first() -> None:
    scheduler, _ = make(100, max_num_seqs=1)
    for key, priority in ((1, 2), (2, 1), (3, 0)):
        scheduler.add(request(key, 4, max_tokens=1, priority=priority))
    order = [run_step(scheduler)[0][0] for _ in range(3)]
    assert order == [3, 2, 1]


def test_the_newest_request_gives_way_and_is_recomputed_from_its_tokens() -> None:
    scheduler, pool = make(4)
    scheduler.add(request(1, 7, max_tokens=6))
    scheduler.add(request(2, 3, max_tokens=6))
    newest = scheduler.waiting()[1]
    for _ in range(3):
        run_step(scheduler)
    assert newest.preemptions == 1
    assert newest.computed == 0
    generated = list(newest.tokens)
    while scheduler.num_running or scheduler.num_waiting:
        run_step(scheduler)
    assert newest.tokens[: len(generated)] == generated
    assert newest.output_len == 6
    assert pool.num_used == 0


def test_a_key_cannot_be_used_twice() -> None:
    scheduler, _ = make(4)
    scheduler.add(request(1, 2))
    with pytest.raises(Exception, match="already in use"):
        scheduler.add(request(1, 2))


@pytest.mark.parametrize("ignore_eos, ends_after", [(False, 2), (True, 3)])
def test_a_stop_token_ends_a_request_even_when_eos_does_not(ignore_eos: bool, ends_after: int) -> None:
    scheduler, _ = make(10)
    sampling = SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=(9,), ignore_eos=ignore_eos)
    scheduler.add(Request(1, [1, 1], 2, sampling))
    ended = []
    for token in (9, EOS, 9):  # the first comes before min_tokens
        plan = scheduler.schedule(0)
        scheduler.advance(plan)
        ended += scheduler.resolve(plan, [token], 0)
    assert [(request.output_len, reason) for request, reason in ended] == [(ends_after, "stop")]
