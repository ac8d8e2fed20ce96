"""A step that is launched before the one ahead of it is resolved: what is known, and what must wait."""

from __future__ import annotations

import pytest

from morph_runtime.config import CacheSettings, SchedulerSettings
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.errors import IntegrityError
from morph_runtime.kv import BlockPool
from morph_runtime.scheduler import PrefixCache, Request, RequestState, Scheduler, StepPlan

EOS = 7


class Bench:
    """A scheduler over blocks of four tokens, and the requests in it."""

    def __init__(self, blocks: int = 20, prefix: bool = True, max_num_seqs: int = 8) -> None:
        self.pool = BlockPool(blocks)
        settings = SchedulerSettings(max_num_seqs=max_num_seqs, max_num_batched_tokens=16, watermark=0.0)
        cache = PrefixCache(CacheSettings(prefix=prefix), self.pool, 4)
        self.scheduler = Scheduler(settings, self.pool, cache, 4, 100, [EOS])

    def add(self, key: int, prompt: int, max_tokens: int = 20) -> Request:
        request = Request(key, [key] * prompt, prompt, SamplingParams(max_tokens=max_tokens), 0, float(key))
        self.scheduler.add(request)
        return request

    def launch(self) -> StepPlan:
        plan = self.scheduler.schedule(0)
        self.scheduler.advance(plan)
        self.check()
        return plan

    def resolve(self, plan: StepPlan, *tokens: int) -> list[tuple[int, str]]:
        ended = self.scheduler.resolve(plan, tokens, 0)
        self.check()
        return [(request.key, reason) for request, reason in ended]

    def check(self) -> None:
        self.pool.check_integrity()
        self.scheduler.check_integrity()


def test_an_unknown_token_stands_for_its_row_until_it_is_known() -> None:
    bench = Bench()
    first, second = bench.add(1, 3), bench.add(2, 2)
    ahead = bench.launch()
    behind = bench.launch()
    assert [(part.start, part.length) for part in behind.slices] == [(3, 1), (2, 1)]
    assert first.tokens == [1, 1, 1, -1, -1] and second.tokens == [2, 2, -2, -2]
    assert bench.resolve(ahead, 30, 40) == []
    assert first.tokens == [1, 1, 1, 30, -1] and second.tokens == [2, 2, 40, -2]
    assert bench.resolve(behind, 31, 41) == []
    assert first.tokens == [1, 1, 1, 30, 31] and second.tokens == [2, 2, 40, 41]
    assert first.levels == [0, 0]


def test_an_end_by_length_is_known_before_its_token() -> None:
    bench = Bench()
    bench.add(1, 3, max_tokens=2)
    steps = [bench.launch(), bench.launch()]
    assert bench.launch().slices == []
    bench.scheduler.resolve(StepPlan(), [], 0)
    assert [bench.resolve(steps[0], 30), bench.resolve(steps[1], 31)] == [[], [(1, "length")]]
    assert bench.pool.num_used == 0


@pytest.mark.parametrize("end", ["stop", "cancel"])
def test_what_is_sampled_after_an_end_is_dropped_and_the_blocks_stay_until_it_is_written(end: str) -> None:
    bench = Bench(prefix=False)
    gone, other = bench.add(1, 4), bench.add(2, 4)
    ahead = bench.launch()
    behind = bench.launch()
    blocks = list(gone.blocks)
    if end == "stop":
        assert bench.resolve(ahead, EOS, 40) == [(1, "stop")]
        assert gone.tokens == [1, 1, 1, 1, EOS]
    else:
        assert bench.scheduler.cancel(1) is gone
        assert bench.resolve(ahead, 30, 40) == []
        assert gone.tokens == [1, 1, 1, 1]
    assert gone.state is RequestState.FINISHED and bench.scheduler.num_running == 1
    assert all(bench.pool.holders(block) == 1 for block in blocks), "the step behind still writes there"
    bench.add(3, 4)
    newest = bench.launch()
    assert not set(blocks) & {block for part in newest.slices for block in part.request.blocks}
    assert bench.resolve(behind, 31, 41) == []
    assert not any(bench.pool.holders(block) for block in blocks)
    assert other.tokens[4:6] == [40, 41]


def test_a_request_that_is_cancelled_before_it_ran_is_free_at_once() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add(1, 4)
    bench.add(2, 4)
    plan = bench.launch()
    assert bench.scheduler.cancel(2) is not None
    assert bench.scheduler.num_waiting == 0
    assert bench.resolve(plan, 30) == []


def test_nobody_is_preempted_and_no_block_moves_while_a_step_is_in_flight() -> None:
    bench = Bench(blocks=5, prefix=False)
    bench.add(1, 7)
    bench.add(2, 7)
    ahead = bench.launch()
    behind = bench.launch()  # position 7 of each; the next needs a block of its own
    bench.resolve(ahead, 30, 40)
    assert bench.scheduler.must_preempt
    with pytest.raises(IntegrityError, match="preempted while a step is in flight"):
        bench.scheduler.schedule(0)
    with pytest.raises(IntegrityError, match="moved while a step is in flight"):
        bench.scheduler.remap_blocks({0: 1})
    bench.resolve(behind, 31, 41)
    assert [request.key for request in bench.launch().preempted] == [2]


def test_a_block_is_found_by_others_only_once_the_step_that_fills_it_is_resolved() -> None:
    bench = Bench()
    bench.add(1, 9)
    plan = bench.launch()
    twin = Request(2, [1] * 9, 9, SamplingParams(), 0, 2.0)
    bench.scheduler.add(twin)
    assert bench.scheduler.reusable(twin, 0)[1] == 0
    bench.resolve(plan, 30)
    assert bench.scheduler.reusable(twin, 0)[1] == 2


def test_long_prompts_go_on_chunk_by_chunk_with_steps_in_flight() -> None:
    bench = Bench()
    request = bench.add(1, 40)
    plans = [bench.launch(), bench.launch(), bench.launch()]
    assert [plan.slices[0][1:] for plan in plans] == [(0, 16, False), (16, 16, False), (32, 8, True)]
    for plan, tokens in zip(plans, [(), (), (30,)], strict=True):
        bench.resolve(plan, *tokens)
    assert request.tokens[-1] == 30 and request.computed == 40
