"""Short versions of the long runs of bench/reliability: storms at full precision and with shifts, hostile requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import fuzz, storm

pytestmark = [pytest.mark.triton, pytest.mark.timeout(300)]


@pytest.mark.parametrize("levels", ["fixed", "free"])
def test_no_stream_is_lost_in_a_storm(tmp_path: Path, levels: str) -> None:
    weather = storm.Weather(seed=11, seconds=10, every_s=3, levels=levels, max_tokens=60, silence_s=3)
    report = storm.storm(weather, tmp_path)
    print(*report.lines(), sep="\n")
    assert report.good, "\n".join(report.lines())
    assert report.verdict.ended and report.done


def test_hostile_requests_get_an_answer_or_a_sentence(tmp_path: Path) -> None:
    outcomes, wrong, figures = fuzz.run(tmp_path, seed=5, requests=300)
    assert not wrong, "\n".join(wrong[:10])
    assert outcomes["200"] and outcomes["400"], (outcomes, figures)
