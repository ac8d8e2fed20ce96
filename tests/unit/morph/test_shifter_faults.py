"""Random walks over levels with shifts that fail: books stay right, the failed layer serves on, tries are spaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.conftest import make_model, submit
from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.errors import ConfigError
from morph_runtime.morph.shifter import FIRST_HOLD_S


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def small_engine(folder: Path) -> Engine:
    return build_engine(
        EngineConfig.from_mapping(
            {
                "model": {"path": str(folder), "dtype": "float32"},
                "memory": {"kv_tokens": 256, "block_tokens": 8, "extent_kib": 16},
                "morph": {"mode": "off", "ladder": ["w8", "w4"], "costs": "off"},
                "kernels": {"threads": 1},
                "check_integrity": True,
            }
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), kv_heads=2)


def make_machine(folder: Path) -> type[RuleBasedStateMachine]:
    class SwapperMachine(RuleBasedStateMachine):
        """Targets, steps, requests and injected failures of the fill and of the system's mappings."""

        @initialize()
        def start(self) -> None:
            self.engine = small_engine(folder)
            self.parts = self.engine.parts
            self.clock = Clock()
            self.parts.shifter._clock = self.clock
            self.fill, self.map = self.parts.swapper._slots.fill, self.parts.arena.map
            self.key = 0

        @rule(level=st.integers(0, 8))
        def aim(self, level: int) -> None:
            self.parts.shifter.target = level

        @rule(prompt=st.integers(1, 60), tokens=st.integers(1, 20))
        def request(self, prompt: int, tokens: int) -> None:
            self.key += 1
            submit(self.engine, self.key, [1 + self.key % 190] * prompt, tokens)

        @precondition(lambda self: self.key)
        @rule(data=st.data())
        def cancel(self, data: st.DataObject) -> None:
            self.engine.cancel(data.draw(st.integers(1, self.key)))

        @rule(count=st.integers(1, 4))
        def step(self, count: int) -> None:
            for _ in range(count):
                self.engine.step(decide=False)

        @rule(seconds=st.sampled_from([0.5, 2.0, 100.0]))
        def wait(self, seconds: float) -> None:
            self.clock.now += seconds

        @rule(error=st.sampled_from([ConfigError("the checkpoint is gone"), OSError(5, "input/output error")]))
        def fills_fail(self, error: Exception) -> None:
            def fail(*_: object) -> None:
                raise error

            self.parts.swapper._slots.fill = fail  # type: ignore[method-assign]

        @rule()
        def mappings_fail(self) -> None:
            def refuse(*_: object) -> None:
                raise OSError(12, "cannot allocate memory")

            self.parts.arena.map = refuse  # type: ignore[method-assign]

        @rule()
        def recover(self) -> None:
            self.parts.swapper._slots.fill = self.fill  # type: ignore[method-assign]
            self.parts.arena.map = self.map  # type: ignore[method-assign]

        @invariant()
        def books_agree(self) -> None:
            if hasattr(self, "engine"):
                self.engine.check_integrity()
                plan = self.parts.shifter._plan
                assert self.parts.swapper.rungs == plan.rungs(self.parts.shifter.level)

        def teardown(self) -> None:
            """When the faults are over, every level can be reached again and everything comes to its end."""
            if not hasattr(self, "engine"):
                return
            self.recover()
            self.clock.now += 1000
            while self.engine.has_requests or self.parts.shifter.busy:
                self.engine.step(decide=False)
            for level in (8, 0):
                self.clock.now += 1000
                self.engine.set_level(level)
                assert self.engine.level == level
                assert self.parts.pool.capacity == self.parts.capacities[level]
            self.engine.close()

    return SwapperMachine


def test_levels_books_and_requests_survive_failing_shifts(folder: Path) -> None:
    machine = make_machine(folder)
    machine.TestCase.settings = settings(
        max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case = machine.TestCase("runTest")
    case.runTest()


def test_a_shift_that_fails_is_not_tried_again_at_once(folder: Path) -> None:
    engine = small_engine(folder)
    shifter, clock = engine.parts.shifter, Clock()
    shifter._clock = clock
    fills = 0

    def fail(*_: object) -> None:
        nonlocal fills
        fills += 1
        raise ConfigError("the checkpoint is gone")

    engine.parts.swapper._slots.fill = fail  # type: ignore[method-assign]
    for tick in range(100):
        clock.now = tick * 0.05
        shifter.target = 1
        shifter.poll()
        while shifter.busy:
            shifter.poll()
    assert fills == 3, "at 0 s, 1 s and 3 s"
    assert FIRST_HOLD_S == 1.0
    assert engine.level == 0
    assert engine.stats().shifts_refused == 3
    engine.close()
