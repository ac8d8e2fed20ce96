"""The health check: a page of metrics, and what it says of the engine."""

from __future__ import annotations

import pytest

from morph_backend.health import complaint_of, page_complaint

LABELS = '{model="morph",version="1"}'
PAGE = f"morph_engine_up{LABELS} 1.000000\nmorph_engine_heartbeat_seconds{LABELS} 1000.5\nother 3\n"


def test_a_fresh_heartbeat_is_good() -> None:
    assert page_complaint(PAGE, 1001.0) == ""


def test_an_engine_that_is_being_restarted_is_no_reason_to_end_the_server() -> None:
    assert page_complaint(PAGE.replace("1.000000", "0.000000"), 1001.0) == ""


@pytest.mark.parametrize(
    "page, said",
    [
        (PAGE, "The engine's last sign of life is 40 s old."),
        (PAGE.replace("1.000000", "0.000000"), "The engine is down."),
        ("other 3\n", "exports no heartbeat"),
    ],
)
def test_what_is_wrong_is_one_sentence(page: str, said: str) -> None:
    assert said in page_complaint(page, 1040.5)


def test_a_heartbeat_ahead_of_a_clock_that_was_set_back_does_not_hide_a_dead_engine() -> None:
    assert "3600 s ahead of the clock" in page_complaint(PAGE, 1000.5 - 3600)


def test_no_server_at_all() -> None:
    assert complaint_of({"MORPH_HTTP_PORT": "1"}).startswith("Triton does not answer:")
