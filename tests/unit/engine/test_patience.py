"""An engine that cannot start is given up soon; one that somebody keeps ending is given up late; both with pauses."""

from __future__ import annotations

import pytest

from morph_runtime.engine.patience import IN_ALL_FACTOR, LONGEST_PAUSE_S, Patience


def test_an_engine_that_fails_of_itself_gets_so_many_restarts_with_growing_pauses() -> None:
    patience = Patience(restarts=5, pause_s=0.5)
    assert [patience.next_pause_s(outside=False) for _ in range(6)] == [0.0, 0.5, 1.0, 2.0, 4.0, None]
    assert patience.in_vain == 5


def test_an_engine_that_is_ended_while_it_starts_gets_more_but_not_for_ever() -> None:
    patience = Patience(restarts=5, pause_s=0.5)
    pauses = []
    while (pause_s := patience.next_pause_s(outside=True)) is not None:
        pauses.append(pause_s)
    assert len(pauses) == 5 * IN_ALL_FACTOR
    assert pauses[:4] == [0.0, 0.5, 1.0, 2.0]
    assert pauses == sorted(pauses) and pauses[-1] == LONGEST_PAUSE_S, "a loop of kills must not burn the processor"


def test_kills_between_do_not_hide_that_an_engine_cannot_start() -> None:
    patience = Patience(restarts=3, pause_s=0.5)
    ends = [True, False, True, True, False, True, False]
    assert [patience.next_pause_s(end) is None for end in ends] == [False] * 6 + [True]


def test_failures_of_its_own_count_among_the_kills() -> None:
    patience = Patience(restarts=2, pause_s=0.0)
    ends = [True, False, *[True] * (2 * IN_ALL_FACTOR - 1)]
    assert [patience.next_pause_s(end) is None for end in ends] == [False] * (len(ends) - 1) + [True]


def test_after_a_good_start_counting_begins_anew() -> None:
    patience = Patience(restarts=2, pause_s=0.5)
    for _ in range(10):
        assert [patience.next_pause_s(outside=False) for _ in range(2)] == [0.0, 0.5]
        patience.well_started()
        assert patience.in_vain == 0


def test_an_end_that_a_request_is_convicted_of_is_no_failure_of_the_engines_own() -> None:
    patience = Patience(restarts=2, pause_s=0.5)
    ends = [(False, False), (False, False), *[(False, True)] * 3, (False, False), (False, False)]
    assert [patience.next_pause_s(*end) is None for end in ends] == [False] * 6 + [True]
    patience = Patience(restarts=2, pause_s=0.5)
    pauses = [patience.next_pause_s(False, convicted=True) for _ in range(2 + 2 * IN_ALL_FACTOR)]
    assert pauses[:3] == [0.0, 0.5, 1.0] and pauses.index(None) == 2 * IN_ALL_FACTOR


@pytest.mark.parametrize("outside", [False, True])
def test_without_restarts_the_first_end_is_the_last(outside: bool) -> None:
    assert Patience(restarts=0, pause_s=0.5).next_pause_s(outside) is None


def test_the_most_restarts_that_can_be_set_have_pauses() -> None:
    patience = Patience(restarts=1000, pause_s=30.0)
    assert all(patience.next_pause_s(outside=True) is not None for _ in range(1000 * IN_ALL_FACTOR))
