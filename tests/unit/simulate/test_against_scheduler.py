"""The simulated engine gives every request the times that the engine's own scheduler gives it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_runtime.simulate.arrivals import Arrivals
from morph_runtime.simulate.engine import SimulatedEngine
from tests.unit.simulate.reference import Reference, tiny_profile

# Seconds between arrivals, prompt, output: up to the 48 tokens that base capacity holds.
REQUESTS = st.lists(
    st.tuples(st.floats(0, 0.2), st.integers(1, 28), st.integers(1, 20)), min_size=1, max_size=25
)  # fmt: skip

# Several of them fit into one step, and their outputs fill the cache.
SHORT_REQUESTS = st.lists(
    st.tuples(st.floats(0, 0.01), st.integers(1, 5), st.integers(8, 20)), min_size=8, max_size=25
)  # fmt: skip


def trace(requests: list[tuple[float, int, int]]) -> Arrivals:
    gaps, prompts, outputs = zip(*requests, strict=True)
    return Arrivals(np.cumsum(gaps) * 1.0137 + 0.000719, np.array(prompts), np.array(outputs))


def simulate(engine: SimulatedEngine, arrivals: Arrivals) -> None:
    for at_s, prompt, output in zip(
        arrivals.arrival_s.tolist(), arrivals.prompt_tokens.tolist(), arrivals.output_tokens.tolist(), strict=True
    ):
        engine.submit(at_s, prompt, output)
    engine.run_until(1e6)


def assert_same_times(engine: SimulatedEngine, reference: Reference, count: int) -> None:
    assert engine.unfinished == 0
    assert engine.used == 0
    assert engine.preemptions == reference.scheduler.preemptions
    # A request leaves the queue when it has come and the one before it is in the engine.
    left_s = np.maximum(engine.records.arrival_s, [0.0, *reference.entered_s[:-1]])
    np.testing.assert_allclose([engine.queue.left_s(k) for k in range(count)], left_s, rtol=1e-9)
    np.testing.assert_allclose(engine.records.first_s, [reference.first_s[k] for k in range(count)], rtol=1e-9)
    np.testing.assert_allclose(engine.records.last_s, [reference.last_s[k] for k in range(count)], rtol=1e-9)


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=30, deadline=None)
@given(requests=REQUESTS, level=st.sampled_from([0, 3, 8]), line=st.integers(1, 4), seqs=st.integers(1, 6))
def test_first_and_last_tokens_come_when_the_scheduler_makes_them(
    overlap: bool, requests: list[tuple[float, int, int]], level: int, line: int, seqs: int
) -> None:
    profile = tiny_profile(line=line, seqs=seqs, overlap=overlap)
    arrivals = trace(requests)
    engine, reference = SimulatedEngine(profile, level), Reference(profile, level)
    simulate(engine, arrivals)
    reference.run(arrivals)
    assert_same_times(engine, reference, len(arrivals))


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=15, deadline=None)
@given(requests=SHORT_REQUESTS, seqs=st.integers(4, 8))
def test_short_prompts_before_a_full_cache_enter_when_the_scheduler_would_let_them(
    overlap: bool, requests: list[tuple[float, int, int]], seqs: int
) -> None:
    profile = tiny_profile(seqs=seqs, overlap=overlap)
    arrivals = trace(requests)
    engine, reference = SimulatedEngine(profile), Reference(profile)
    simulate(engine, arrivals)
    reference.run(arrivals)
    assert_same_times(engine, reference, len(arrivals))


@settings(max_examples=30, deadline=None)
@given(requests=REQUESTS, script=st.lists(st.tuples(st.floats(0.001, 0.4), st.integers(0, 8)), max_size=8))
def test_levels_and_capacities_that_change_on_the_way_make_no_difference(
    requests: list[tuple[float, int, int]], script: list[tuple[float, int]]
) -> None:
    profile = tiny_profile()
    arrivals = trace(requests)
    orders = [(at, level) for at, (_, level) in zip(np.cumsum([gap for gap, _ in script]), script, strict=True)]
    left = list(orders)

    def decide(engine: SimulatedEngine) -> None:
        engine.shifts.target = left.pop(0)[1]
        engine.plan_decision(left[0][0] if left else np.inf)

    engine = SimulatedEngine(profile, decide=decide)
    engine.plan_decision(left[0][0] if left else np.inf)
    reference = Reference(profile, script=orders)
    simulate(engine, arrivals)
    reference.run(arrivals)
    assert_same_times(engine, reference, len(arrivals))
