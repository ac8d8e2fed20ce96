"""Several layers change at once on a device that works through a queue: pages move only behind its fences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from engine.conftest import make_model, submit
from morph.test_shifter_faults import small_engine
from morph_runtime.engine.core import Engine
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


def weights_of(engine: Engine) -> list[bytes]:
    swapper = engine.parts.swapper
    return [swapper.slot_bytes_of(layer).numpy().tobytes() for layer in range(engine.parts.spec.layers)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), kv_heads=2)


def make_machine(folder: Path) -> type[RuleBasedStateMachine]:
    class PipelineMachine(RuleBasedStateMachine):
        """Targets, requests and steps, while the device lags behind by any amount."""

        @initialize()
        def start(self) -> None:
            self.engine, self.queue = queued_engine(folder)
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

        @rule(count=st.integers(1, 6))
        def the_device_gets_on(self, count: int) -> None:
            self.queue.passed = min(self.queue.passed + count, self.queue.made)

        @invariant()
        def books_agree(self) -> None:
            """Slots of flipped layers stay mapped until their fence is done: the swapper's integrity check."""
            if hasattr(self, "engine"):
                self.engine.check_integrity()
                shifter = self.engine.parts.shifter
                assert self.engine.parts.swapper.rungs == shifter._plan.rungs(shifter.level)

        def teardown(self) -> None:
            if not hasattr(self, "engine"):
                return
            while self.engine.has_requests:
                self.queue.passed = self.queue.made
                self.engine.step(decide=False)
            for level in (8, 3, 0):
                self.engine.set_level(level)
                assert self.engine.level == level
                assert self.engine.parts.pool.capacity == self.engine.parts.capacities[level]
            assert weights_of(self.engine) == self.weights
            self.engine.parts.arena.close()

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
