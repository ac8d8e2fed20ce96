"""A level fixes every layer's precision; neighbouring levels differ in one layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import RUNG_BITS
from morph_runtime.morph.levels import LevelPlan, parse_order

LADDERS = (("w4",), ("w8",), ("w8", "w4"))


@given(order=st.integers(1, 8).flatmap(lambda n: st.permutations(range(n))), ladder=st.sampled_from(LADDERS))
def test_neighbouring_levels_differ_in_one_layer_that_loses_bits(order: list[int], ladder: tuple[str, ...]) -> None:
    plan = LevelPlan(order, ladder)  # type: ignore[arg-type]
    assert plan.rungs(0) == ("full",) * len(order)
    assert plan.rungs(plan.max_level) == (ladder[-1],) * len(order)
    for level in range(plan.max_level):
        before, after = plan.rungs(level), plan.rungs(level + 1)
        changed = [i for i in range(len(order)) if before[i] != after[i]]
        assert changed == [order[level % len(order)]]
        assert RUNG_BITS[after[changed[0]]] < RUNG_BITS[before[changed[0]]]
        down, up = plan.transition(level, 1), plan.transition(level + 1, -1)
        assert (down.layer, down.source, down.target) == (changed[0], before[changed[0]], after[changed[0]])
        assert (down.layer, down.source, down.target) == (up.layer, up.target, up.source)
        assert down.is_down
        assert not up.is_down


def test_a_level_outside_the_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 3"):
        LevelPlan((0, 1, 2), ("w4",)).rungs(4)
    for level, direction in ((3, 1), (0, -1)):
        with pytest.raises(ValueError, match="no change between the levels"):
            LevelPlan((0, 1, 2), ("w4",)).transition(level, direction)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", (0, 1, 2)), ("front_to_back", (0, 1, 2)), ("back_to_front", (2, 1, 0)), ("1,0,2", (1, 0, 2))],
)
def test_an_order_is_read_from_its_setting(text: str, expected: tuple[int, ...]) -> None:
    assert parse_order(text, 3) == expected


@pytest.mark.parametrize("text", ["", "0,1", "0,1,1", "0,1,3", "front"])
def test_an_order_that_is_no_permutation_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"morph\.order must be"):
        parse_order(text, 3)
