"""Several layers change at once on a device that works through a queue: pages move only behind its fences, by a
thread that may take its time and that the system may refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from engine.conftest import make_model, submit
from memory.stub_driver import HandWorker, StubDriver
from morph.test_shifter_faults import Clock, small_engine
from morph_runtime.engine.core import Engine
from morph_runtime.kernels.rung import Rung
from morph_runtime.memory.arena import VirtualRange
from morph_runtime.memory.fence import DeviceOrder, Fence
from morph_runtime.morph.filling import Filling, LayerFiller
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.slots import LayerSlots


class Queue(DeviceOrder):
    """A device that is `late` by some fences: those that were asked for last are not done."""

    def __init__(self) -> None:
        self.made = 0
        self.passed = 0

    @property
    def queues(self) -> bool:
        return True

    def fence(self) -> Fence:
        self.made += 1
        return QueueFence(self, self.made)


class QueueFence(Fence):
    def __init__(self, queue: Queue, number: int) -> None:
        self._queue, self._number = queue, number

    def done(self) -> bool:
        return self._queue.passed >= self._number

    def wait(self) -> None:
        self._queue.passed = max(self._queue.passed, self._number)


class LateFilling(Filling):
    """Filled already, but a copy is said to be under way until the queue has passed it."""

    def __init__(self, fence: Fence, at_once: bool) -> None:
        self._fence, self._at_once = fence, at_once

    def done(self) -> bool:
        return self._at_once or self._fence.done()

    def wait(self) -> None:
        self._fence.wait()

    def finish(self) -> None:
        assert self.done()


class DeepFiller(LayerFiller):
    """Takes four slots at a time; quantized ones are ready at once, as on a GPU."""

    def __init__(self, slots: LayerSlots, queue: Queue) -> None:
        self.slots, self._queue = slots, queue

    @property
    def depth(self) -> int:
        return 4

    def start(
        self, target: LayerWeights, slot: Tensor, source: LayerWeights | None, wake: Callable[[], None]
    ) -> Filling:
        self.slots.fill(target.layer, target.rung, slot, source)
        return LateFilling(self._queue.fence(), target.rung != "full")

    def close(self) -> None:
        return None


def queued_engine(folder: Path) -> tuple[Engine, Queue]:
    engine, queue = small_engine(folder), Queue()
    parts = engine.parts
    parts.swapper.close()
    parts.swapper._filler = DeepFiller(parts.swapper._slots, queue)
    parts.resizer._order = parts.shifter._order = queue
    return engine, queue


class Driven:
    """An engine on a queue whose pages are moved by hand. What steps and fills touch must have memory, in truth, from
    when they are put into the queue until a fence behind them has passed."""

    def __init__(self, folder: Path) -> None:
        self.engine, self.queue = queued_engine(folder)
        self.parts = self.engine.parts
        self.worker = HandWorker()
        self.driver = StubDriver(self.parts.arena, self.worker)
        self.driver.in_use = self.in_use
        self.clock = Clock()
        self.parts.shifter._clock = self.clock
        self.uses: list[tuple[int, set[int]]] = []
        """What was put into the queue: how many fences were made before, addresses of the pieces that it touches."""
        runner: Any = self.parts.runner
        self._launch, runner.launch = runner.launch, self.launch
        filler: Any = self.parts.swapper._filler
        self._start, filler.start = filler.start, self.start

    def launch(self, *arguments: Any) -> Any:
        self.use([*self.kv(), *(self.slot(layer, rung) for layer, rung in enumerate(self.parts.swapper.rungs))])
        return self._launch(*arguments)

    def start(self, target: LayerWeights, slot: Tensor, source: LayerWeights | None, wake: Callable[[], None]) -> Any:
        self.use([self.slot(one.layer, one.rung) for one in (target, source) if one is not None])
        return self._start(target, slot, source, wake)

    def slot(self, layer: int, rung: Rung) -> tuple[VirtualRange, range]:
        swapper = self.parts.swapper
        slots = swapper._ranges[rung]
        return slots._range, slots._pieces(swapper._place[layer])

    def kv(self) -> list[tuple[VirtualRange, range]]:
        """What lies behind the capacity."""
        cache, extent_bytes = self.parts.cache, self.parts.arena.extent_bytes
        pieces = range(-(-self.parts.pool.capacity * cache.layout.range_block_bytes // extent_bytes))
        return [(span, pieces) for span in cache._ranges]

    def use(self, touched: list[tuple[VirtualRange, range]]) -> None:
        assert all(self.driver.has(*one) for one in touched), "used before its memory is there"
        self.uses.append((self.queue.made, set().union(*(self.driver.addresses(*one) for one in touched))))

    def in_use(self) -> set[int]:
        self.uses = [(made, touched) for made, touched in self.uses if made >= self.queue.passed]
        return set().union(*(touched for _, touched in self.uses))

    def get_on(self) -> None:
        """Queue and driver do all they have."""
        self.queue.passed = self.queue.made
        self.worker.step()

    def close(self) -> None:
        self.parts.arena.settle()
        assert self.driver.agrees()
        self.parts.arena.close()


def weights_of(engine: Engine) -> list[bytes]:
    swapper = engine.parts.swapper
    return [swapper.slot_bytes_of(layer).numpy().tobytes() for layer in range(engine.parts.spec.layers)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), kv_heads=2)


def make_machine(folder: Path) -> type[RuleBasedStateMachine]:
    class PipelineMachine(RuleBasedStateMachine):
        """Targets, requests and steps, while device and driver lag behind by any amount, and mappings are refused."""

        @initialize()
        def start(self) -> None:
            self.driven = Driven(folder)
            self.engine, self.queue = self.driven.engine, self.driven.queue
            self.weights = weights_of(self.engine)
            self.key = 0

        @rule(level=st.integers(0, 8))
        def aim(self, level: int) -> None:
            self.engine.parts.shifter.target = level

        @rule(prompt=st.integers(1, 60), tokens=st.integers(1, 20))
        def request(self, prompt: int, tokens: int) -> None:
            self.key += 1
            submit(self.engine, self.key, [1 + self.key % 190] * prompt, tokens)

        @rule(count=st.integers(1, 4))
        def step(self, count: int) -> None:
            for _ in range(count):
                self.engine.step(decide=False)

        @rule(count=st.integers(1, 4))
        def steps_while_all_get_on(self, count: int) -> None:
            for _ in range(count):
                self.driven.get_on()
                self.engine.step(decide=False)

        @rule(count=st.integers(1, 6))
        def the_device_gets_on(self, count: int) -> None:
            self.queue.passed = min(self.queue.passed + count, self.queue.made)

        @rule(count=st.integers(1, 3))
        def the_driver_gets_on(self, count: int) -> None:
            self.driven.worker.step(count)

        @rule(nth=st.integers(1, 6))
        def a_mapping_will_be_refused(self, nth: int) -> None:
            self.driven.driver.refuse_map_in = nth

        @rule(seconds=st.sampled_from([0.5, 100.0]))
        def wait(self, seconds: float) -> None:
            self.driven.clock.now += seconds

        @invariant()
        def books_agree(self) -> None:
            """Slots of flipped layers stay mapped until their fence is done: the swapper's integrity check."""
            if hasattr(self, "engine"):
                self.engine.check_integrity()
                self.driven.driver.check()
                shifter = self.engine.parts.shifter
                assert self.engine.parts.swapper.rungs == shifter._plan.rungs(shifter.level)
                assert shifter.busy or self.driven.driver.agrees()

        def teardown(self) -> None:
            if not hasattr(self, "engine"):
                return
            self.driven.driver.refuse_map_in = 0
            while self.engine.has_requests or self.engine.parts.shifter.busy:
                self.driven.get_on()
                self.engine.step(decide=False)
            for level in (8, 3, 0):
                self.driven.clock.now += 1000
                self.engine.set_level(level)
                assert self.engine.level == level
                assert self.engine.parts.pool.capacity == self.engine.parts.capacities[level]
                assert self.driven.driver.agrees()
            assert weights_of(self.engine) == self.weights
            self.driven.close()

    return PipelineMachine


def test_pages_move_only_behind_fences_and_every_level_is_reached(folder: Path) -> None:
    machine = make_machine(folder)
    machine.TestCase.settings = settings(
        max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase("runTest").runTest()


def test_a_walk_down_takes_more_layers_with_every_round(folder: Path) -> None:
    """Pages that the first layers gave up are the room for the next: four layers take fewer rounds than layers."""
    engine, queue = queued_engine(folder)
    engine.parts.shifter.target = 4
    levels = []
    while engine.parts.shifter.busy or engine.level < 4:
        engine.step(decide=False)
        levels.append(engine.level)
        queue.passed = queue.made
    steps = [b - a for a, b in zip([0, *levels], levels, strict=False) if b != a]
    assert sum(steps) == 4
    assert len(steps) < 4
    assert engine.parts.pool.capacity == engine.parts.capacities[4]
    engine.parts.arena.close()


def rounds(driven: Driven, level: int) -> tuple[list[int], int]:
    """Go to a level, device and driver done with everything between two steps: the level after each step until the last
    layer has flipped, and the steps until all pages have moved."""
    shifter, levels = driven.parts.shifter, []
    shifter.target = level
    while driven.engine.level != level:
        driven.engine.step(decide=False)
        driven.get_on()
        levels.append(driven.engine.level)
    count = len(levels)
    while shifter.busy:
        driven.engine.step(decide=False)
        driven.get_on()
        count += 1
    assert driven.parts.pool.capacity == driven.parts.capacities[level]
    return levels, count


def test_a_layer_flips_at_the_boundary_after_the_one_that_ordered_its_memory(folder: Path) -> None:
    """Then one that gives its pages away and orders them for KV blocks, and one that publishes these."""
    driven = Driven(folder)
    assert rounds(driven, 1) == ([0, 1], 4)
    assert rounds(driven, 0)[0][-1] == 0
    driven.close()


def test_pages_are_ordered_anew_at_the_boundary_at_which_they_are_lent_or_freed(folder: Path) -> None:
    """The first layer's from staging; the second's are lent then, and ordered when that flips; what it frees is ordered
    for the others one boundary later, when no step reads it, and they flip at the next."""
    driven = Driven(folder)
    assert rounds(driven, 4)[0] == [0, 1, 2, 4]
    driven.close()


def test_a_slow_driver_delays_the_change_and_no_step(folder: Path) -> None:
    driven = Driven(folder)
    submit(driven.engine, 1, [5, 6, 7], 40)
    driven.parts.shifter.target = 4
    for _ in range(30):
        driven.queue.passed = driven.queue.made
        driven.engine.step(decide=False)
    assert driven.engine.level == 0 and driven.parts.shifter.busy and driven.worker.line
    assert driven.parts.pool.capacity <= driven.parts.capacities[0]
    while driven.engine.level < 4 or driven.parts.shifter.busy:
        driven.worker.step(1)
        driven.queue.passed = driven.queue.made
        driven.engine.step(decide=False)
    assert driven.parts.pool.capacity == driven.parts.capacities[4]
    driven.close()


def test_a_layer_whose_mapping_is_refused_serves_on_with_those_behind_it(folder: Path) -> None:
    driven = Driven(folder)
    shifter = driven.parts.shifter
    weights = weights_of(driven.engine)
    driven.driver.refuse_map_in = 1
    shifter.target = 4
    while shifter.busy or not shifter.counters.refused:
        driven.engine.step(decide=False)
        driven.get_on()
    assert (driven.engine.level, shifter.target, shifter.counters.refused) == (0, 0, 1)
    assert weights_of(driven.engine) == weights and driven.driver.agrees()
    driven.clock.now += 1000
    rounds(driven, 4)
    driven.close()


def test_layers_that_all_get_no_memory_are_called_off_together(folder: Path) -> None:
    driven = Driven(folder)
    shifter, swapper = driven.parts.shifter, driven.parts.swapper
    shifter.target = 4
    for _ in range(3):
        driven.engine.step(decide=False)
        driven.queue.passed = driven.queue.made
    assert swapper.num_pending > 1
    driven.driver.refuses_maps = True
    driven.worker.step()
    assert driven.driver.refused > 1
    driven.engine.step(decide=False)
    assert swapper.num_pending == 0 and driven.engine.level == 0
    driven.driver.refuses_maps = False
    while shifter.busy:
        driven.engine.step(decide=False)
        driven.get_on()
    assert driven.driver.agrees()
    driven.clock.now += 1000
    rounds(driven, 4)
    driven.close()


def test_kv_blocks_whose_memory_is_refused_are_not_published_and_come_with_the_next_change(folder: Path) -> None:
    driven = Driven(folder)
    before = driven.parts.pool.capacity
    shifter = driven.parts.shifter
    shifter.target = 1
    while driven.engine.level == 0:
        driven.engine.step(decide=False)
        driven.get_on()
    driven.driver.refuse_map_in = 2
    while shifter.busy:
        driven.engine.step(decide=False)
        driven.get_on()
    assert driven.driver.refused == 1 and driven.parts.pool.capacity <= before
    assert driven.driver.agrees()
    rounds(driven, 2)
    driven.close()


def test_memory_that_cannot_be_taken_away_ends_the_engine_and_stays_accounted_for(folder: Path) -> None:
    driven = Driven(folder)
    driven.driver.refuse_unmap_in = 2
    driven.parts.shifter.target = 4
    with pytest.raises(OSError, match="no memory to be had back"):
        rounds(driven, 4)
    driven.parts.arena.check_integrity()
    assert driven.driver.agrees()
    driven.close()
