"""The soak's judgement: what grows is named, what only wavers is not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.plan import Ask, samplings
from tests.chaos.slopes import Sample, sample, slope_per_hour
from tests.chaos.soak import Course, Findings, fault_of
from tests.chaos.streams import Seen

NAMES = ("stub", "engine", "server", "echo server", "echo stub")


def findings(**grows: float) -> Findings:
    """An hour in which processes grow by so many MB, while all waver by half a MB."""
    found, dice = Findings(Course(1, 60, 10, 0.7, 150)), random.Random(4)
    for at_s in range(0, 3600, 160):
        warm = 20.0 * min(1.0, at_s / 600)
        for name in NAMES:
            grown = grows.get(name.replace(" ", "_"), 0.0) * at_s / 3600
            found.samples[name].append(Sample(at_s, 300 + warm + grown + dice.uniform(-0.5, 0.5), 100, 5, 7))
    found.judge()
    return found


def test_a_steady_server_is_good_whatever_it_took_at_first() -> None:
    assert findings().complaints == []


@pytest.mark.parametrize("name", ["stub", "engine", "server"])
def test_a_process_that_grows_is_named(name: str) -> None:
    (complaint,) = findings(**{name: 6.0}).complaints
    assert complaint.startswith(name) and "MB/h" in complaint


def test_what_triton_itself_grows_is_not_held_against_us() -> None:
    assert findings(server=6.0, echo_server=6.0).complaints == []


def test_descriptors_that_pile_up_are_named() -> None:
    found = findings()
    found.samples["server"][-1] = Sample(3600, 320, 100, 5, 12)
    found.judge()
    assert found.complaints[0].startswith("descriptors of server")


def test_one_wild_sample_does_not_make_a_slope() -> None:
    times = [float(at) for at in range(10)]
    assert slope_per_hour(times, [*(2.0 * at for at in times[:-1]), 1e6]) == pytest.approx(7200.0)


def test_a_sample_is_of_the_process_that_was_meant() -> None:
    taken = sample(int(Path("/proc/self").resolve().name), 3.0)
    assert taken.at_s == 3.0 and taken.resident >= taken.anonymous > 1 and taken.threads >= 1 and taken.descriptors >= 3


def test_a_stream_without_its_end_or_its_tokens_is_a_fault() -> None:
    ask = Ask(0, samplings(30)[0], "grpc", 3)
    good, short, doubled, gone = Seen(ask), Seen(ask), Seen(ask), Seen(ask, left=True)
    for seen, tokens, ends in ((good, 30, 1), (short, 29, 1), (doubled, 30, 2)):
        seen.tokens, seen.ends = tokens, ends
    assert fault_of(good) == fault_of(gone) == ""
    assert "29 tokens" in fault_of(short) and "2 ends" in fault_of(doubled)
    assert "hung" in fault_of(Seen(ask, hung=True)) and "error" in fault_of(Seen(ask, error="x"))
