"""The prefix cache by example: what is found again, at which precision, and when it goes."""

from __future__ import annotations

import pytest

from morph_runtime.config import CacheSettings, SchedulerSettings
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.errors import IntegrityError
from morph_runtime.kv import BlockPool
from morph_runtime.morph.load import Load
from morph_runtime.morph.signals import LoadReader
from morph_runtime.scheduler import PrefixCache, Request, Scheduler

BLOCK = 4
SAME_HASH = 2**61 - 1
"""Python's hash of an int is its remainder by this number."""


class House:
    """A scheduler with its pool; a step's tokens are all 9."""

    def __init__(self, blocks: int, *, prefix: bool = True, reuse: str = "at_least", tokens: int = 64) -> None:
        self.pool = BlockPool(blocks)
        self.prefix = PrefixCache(CacheSettings(prefix=prefix, reuse=reuse), self.pool, BLOCK)
        settings = SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=tokens)
        self.scheduler = Scheduler(settings, self.pool, self.prefix, BLOCK, 1000, ())
        self._key = 0

    def add(self, prompt: list[int], max_tokens: int = 1) -> Request:
        self._key += 1
        request = Request(self._key, list(prompt), len(prompt), SamplingParams(max_tokens=max_tokens), 0, self._key)
        self.scheduler.add(request)
        return request

    def step(self, level: int = 0) -> list[tuple[int, int, int]]:
        """Run one step; (request, start, length) of its slices."""
        plan = self.scheduler.schedule(level)
        slices = [(part.request.key, part.start, part.length) for part in plan.slices]
        self.scheduler.advance(plan)
        self.scheduler.resolve(plan, [9 for part in plan.slices if part.samples], level)
        self.pool.check_integrity()
        self.scheduler.check_integrity()
        return slices

    def serve(self, prompt: list[int], level: int = 0, max_tokens: int = 1) -> int:
        """Serve one request alone; the prompt tokens that came from the cache."""
        request = self.add(prompt, max_tokens)
        while self.scheduler.num_running or self.scheduler.num_waiting:
            self.step(level)
        return request.cached_tokens

    def shrink(self, capacity: int) -> list[tuple[int, int]]:
        self.pool.reserve_below(capacity)
        pairs = self.pool.plan_migration()
        self.scheduler.remap_blocks(dict(pairs))
        self.pool.commit_migration(pairs)
        self.pool.check_integrity()
        self.scheduler.check_integrity()
        return pairs

    def load(self) -> Load:
        return LoadReader((self.pool.capacity,), 8, 512, BLOCK).read(
            0.0, 0, self.pool.num_used, self.scheduler, None, 2.0
        )


def prompt(blocks: int, rest: int = 1) -> list[int]:
    return [*range(blocks * BLOCK), *([7] * rest)]


def test_a_prompt_is_found_again_in_whole_blocks() -> None:
    house = House(20)
    assert house.serve(prompt(3, 2)) == 0
    assert house.serve(prompt(3, 3)) == 12
    assert house.serve([*prompt(2, 0), 99, 99, 99, 99, 99]) == 8
    assert house.serve([99, *prompt(3)]) == 0


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    house = House(20)
    house.serve(prompt(3, 0))
    house.add(prompt(3, 0))
    assert house.step() == [(2, 8, 4)]
    house.serve(prompt(3, 1))
    house.add(prompt(3, 1))
    assert house.step() == [(4, 12, 1)]


def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation() -> None:
    house = House(20)
    house.serve(prompt(1, 1), max_tokens=8)  # tokens 5..12 are generated; the last of them is never computed
    assert house.serve([*prompt(1, 1), *[9] * 8, 5]) == 12


def test_prompts_whose_hashes_agree_are_told_apart_by_their_tokens() -> None:
    house = House(20)
    other = [token + SAME_HASH for token in prompt(2)]
    assert hash(tuple(other)) == hash(tuple(prompt(2)))
    house.serve(prompt(2))
    assert house.serve(other) == 0
    assert house.serve([*other[:BLOCK], *prompt(2)[BLOCK:]]) == BLOCK, "the same block after another one is another"
    assert house.serve(prompt(2)) == 8


@pytest.mark.parametrize(
    ("reuse", "expected"),
    [
        ("exact", {(0, 0): 8, (0, 2): 0, (2, 0): 0, (2, 2): 8}),
        ("at_least", {(0, 0): 8, (0, 2): 8, (2, 0): 0, (2, 2): 8}),
        ("any", {(0, 0): 8, (0, 2): 8, (2, 0): 8, (2, 2): 8}),
    ],
)
def test_the_setting_says_which_precision_may_be_reused(reuse: str, expected: dict[tuple[int, int], int]) -> None:
    for (written, present), tokens in expected.items():
        house = House(20, reuse=reuse)
        house.serve(prompt(2), written)
        assert house.serve(prompt(2), present) == tokens


@pytest.mark.parametrize("reuse", ["exact", "at_least"])
def test_a_block_computed_at_two_levels_counts_as_the_deeper_and_so_do_all_after_it(reuse: str) -> None:
    house = House(20, reuse=reuse, tokens=8)
    house.add(prompt(6), max_tokens=1)
    house.step(level=0)
    assert house.step(level=3) == [(1, 8, 8)]
    house.step(level=0)
    assert house.step(level=0) == [(1, 24, 1)]
    assert house.serve(prompt(6), level=0) == 8
    assert house.serve(prompt(6), level=3) == (0 if reuse == "exact" else 24)


def test_a_milder_block_takes_the_place_of_a_deeper_one() -> None:
    house = House(20)
    house.serve(prompt(3), level=2)
    assert house.pool.num_cached == 3
    house.serve(prompt(3), level=0)
    assert house.pool.num_cached == 3
    assert house.serve(prompt(3), level=0) == 12


def test_exact_keeps_a_block_for_each_level() -> None:
    house = House(20, reuse="exact")
    for level in (0, 2, 1):
        house.serve(prompt(3), level)
    assert house.pool.num_cached == 9
    assert [house.serve(prompt(3), level) for level in (1, 0, 2)] == [12, 12, 12]


def test_what_is_computed_after_a_deeper_prefix_counts_as_deep() -> None:
    house = House(20, reuse="any")
    house.serve(prompt(2), level=3)
    assert house.serve(prompt(3), level=0) == 8
    assert set(house.prefix.find(prompt(3), 0).node.blocks) == {3}


def test_running_requests_share_live_blocks_and_these_need_no_room() -> None:
    house = House(10)
    house.add(prompt(6), max_tokens=3)
    house.step()
    house.add(prompt(6), max_tokens=3)
    assert house.pool.num_free == 3, "without sharing, the second would not fit"
    assert house.step() == [(1, 25, 1), (2, 24, 1)]
    assert house.pool.num_used == 8


def test_cached_blocks_are_free_and_the_oldest_are_evicted_when_their_room_is_needed() -> None:
    house = House(6)
    house.serve([1] * 9)
    house.serve([2] * 9)
    assert (house.pool.num_used, house.pool.num_cached, house.pool.num_free) == (0, 4, 6)
    house.serve([3] * 9)
    assert house.pool.num_cached == 5
    assert house.serve([1] * 9) == BLOCK, "the end of a prefix goes before its beginning"


def test_use_keeps_a_prefix_alive() -> None:
    house = House(6)
    house.serve([1] * 9)
    house.serve([2] * 9)
    house.serve([1] * 9)
    house.serve([3] * 13)
    assert house.serve([1] * 9) == 8


def test_a_preempted_request_resumes_from_what_the_cache_still_holds() -> None:
    house = House(6)
    house.add([1] * 8, max_tokens=9)
    newest = house.add([2] * 7, max_tokens=9)
    while not newest.preemptions:
        house.step()
    resumed: list[tuple[int, int, int]] = []
    while not resumed:
        resumed = [part for part in house.step() if part[0] == newest.key]
    assert resumed[0][1] >= BLOCK
    while house.scheduler.num_running:
        house.step()
    assert newest.output_len == 9
    assert house.scheduler.prefix_queries == 15, "only a first start counts"


def test_a_shrink_evicts_cached_blocks_of_the_tail_and_moves_shared_ones_once() -> None:
    house = House(14)
    first = house.add([1] * 25, max_tokens=8)
    house.step()
    owner = house.add([2] * 8, max_tokens=20)
    house.step()
    sharer = house.add([2] * 8, max_tokens=20)
    house.step()
    shared = owner.blocks[0]
    assert shared == sharer.blocks[0] == 7
    house.scheduler.cancel(first.key)
    pairs = house.shrink(7)
    assert [old for old, _ in pairs].count(shared) == 1
    assert owner.blocks[0] == sharer.blocks[0] == dict(pairs)[shared]
    another = house.add([2] * 8, max_tokens=1)
    house.step()
    assert another.cached_tokens == BLOCK, "the index has followed"


def test_growth_keeps_what_is_cached() -> None:
    house = House(6)
    house.serve(prompt(4))
    house.pool.grow(12)
    assert house.serve(prompt(4)) == 16


def test_a_shrink_keeps_what_is_cached_below_it() -> None:
    house = House(12)
    house.serve(prompt(4))
    house.shrink(2)
    assert house.pool.num_cached == 2
    house.pool.grow(12)
    assert house.serve(prompt(4)) == 8


def test_with_the_cache_off_nothing_is_kept() -> None:
    house = House(12, prefix=False)
    house.serve(prompt(4))
    assert house.pool.num_cached == 0
    assert house.serve(prompt(4)) == 0


def test_the_hit_rate_counts_the_tokens_of_each_request_once() -> None:
    house = House(20)
    house.serve(prompt(3, 1))
    house.serve(prompt(3, 2))
    assert (house.scheduler.prefix_queries, house.scheduler.prefix_hits) == (13 + 14, 12)


def test_the_controller_sees_shared_blocks_once_and_cached_ones_not_at_all() -> None:
    house = House(12)
    house.serve(prompt(6))
    idle = house.load()
    assert (idle.used, idle.growth, idle.demand) == (0, 0, 0)
    house.add(prompt(6), max_tokens=4)
    house.step()
    house.add(prompt(6), max_tokens=4)
    waiting = house.load()
    assert (waiting.used, waiting.waiting_blocks, waiting.head_fits, waiting.demand) == (7, 2, True, 7 + 1 + 2)
    house.step()
    both = house.load()
    assert (both.used, both.growth) == (8, 2)
    assert both.running.blocks.tolist() == [7, 1], "of the second's blocks six are the first's"


def test_damage_to_the_index_is_noticed() -> None:
    for damage in (
        "house.pool.forget(next(iter(house.prefix._entries)))",
        "house.prefix._entries.popitem()",
        "house.prefix._root.children.clear()",
    ):
        house = House(12)
        house.serve(prompt(3))
        house.prefix.check_integrity()
        exec(damage)
        with pytest.raises(IntegrityError):
            house.prefix.check_integrity()


def test_nothing_is_left_in_the_index_when_all_is_evicted() -> None:
    house = House(4)
    house.serve(prompt(3))
    house.shrink(0)
    assert house.prefix.find(prompt(3), 0).blocks == ()
    assert not house.prefix._root.children
