"""What the operator reads of the controller."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from morph_backend.decisions import LOGGER, DecisionLog, decision_line
from morph_runtime.engine.messages import Decision

INPUTS = {"capacity": 64.0, "waiting": 3.0, "pending": -1.0, "demand": 90.5, "used": 60.0}
DOWN = Decision(1.0, "down", "kv_wait", 0, 4, INPUTS)
HOLD = Decision(2.0, "hold", "dwell", 4, 4, INPUTS)
UP = Decision(3.0, "up", "pressure_gone", 4, 0, {**INPUTS, "pending": 0.0})


@pytest.fixture(autouse=True)
def a_fresh_logger() -> Iterator[None]:
    logger = logging.getLogger(LOGGER)
    logger.handlers.clear()
    yield
    logger.handlers.clear()
    logger.propagate = True


def test_a_decision_is_one_line_with_the_inputs_that_were_known() -> None:
    assert decision_line(DOWN) == "level 0 -> 4 down (kv_wait) demand=90.5 capacity=64 waiting=3"
    assert decision_line(UP) == "level 4 -> 0 up (pressure_gone) demand=90.5 capacity=64 waiting=3 pending=0"


def test_changes_are_shown_whatever_the_log_level_and_holds_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    DecisionLog()([DOWN, HOLD, UP])
    DecisionLog()([])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" demand")[0] for line in lines] == [
        "morph: level 0 -> 4 down (kv_wait)",
        "morph: level 4 -> 0 up (pressure_gone)",
    ]


def test_they_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    DecisionLog(enabled=False)([DOWN])
    assert capsys.readouterr().err == ""
