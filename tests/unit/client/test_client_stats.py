from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_client.stats import RequestRecord, Targets, percentile, spread, summarise
from morph_client.types import RungShare


def record(**changes: object) -> RequestRecord:
    plain = RequestRecord(
        index=0,
        due_s=1.0,
        sent_s=1.0,
        prompt_tokens=10,
        output_tokens=5,
        first_s=1.5,
        last_s=2.5,
        level0_tokens=5,
        max_level=0,
        rung_share=RungShare(1.0, 0.0, 0.0),
        error=None,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.floats(min_value=-1e6, max_value=1e6), min_size=1, max_size=60),
    st.sampled_from([0, 1, 50, 95, 99, 100]),
)
def test_percentiles_equal_numpys(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_nothing_measured_is_not_zero() -> None:
    assert spread([]).p50 is None
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_times_count_from_when_a_request_was_due() -> None:
    late = record(sent_s=1.4)
    assert late.ttft_s == pytest.approx(0.5) and late.e2e_s == pytest.approx(1.5)
    assert late.tpot_s == pytest.approx(0.25)
    assert record(output_tokens=1).tpot_s is None
    assert record(first_s=None, last_s=None).ttft_s is None


def test_a_summary_counts_tokens_errors_and_precision() -> None:
    failed = record(index=1, first_s=None, last_s=None, output_tokens=0, rung_share=None, error="no room")
    morphed = record(
        index=2, last_s=6.0, output_tokens=15, level0_tokens=0, max_level=3, rung_share=RungShare(0.5, 0, 0.5)
    )
    summary = summarise([record(), failed, morphed], Targets(ttft_s=0.4))
    assert summary.requests == 3 and summary.errors == 1 and summary.error_kinds == {"no room": 1}
    assert summary.output_tokens == 20 and summary.span_s == pytest.approx(5.0)
    assert summary.output_tokens_per_s == pytest.approx(4.0)
    assert summary.level0_share == pytest.approx(0.25) and summary.max_level == 3
    assert summary.rung_share == RungShare(pytest.approx(0.625), 0.0, pytest.approx(0.375))
    assert summary.slo_violations == 3
    assert summary.ttft_s.mean == pytest.approx(0.5)


def test_without_levels_no_share_is_claimed() -> None:
    summary = summarise([record(rung_share=None, level0_tokens=0)])
    assert summary.level0_share is None and summary.rung_share is None and summary.slo_violations is None


def test_a_run_without_any_answer_is_summed_up_too() -> None:
    summary = summarise([record(first_s=None, last_s=None, output_tokens=0, error="down", rung_share=None)])
    assert summary.output_tokens_per_s == 0.0 and summary.ttft_s.p95 is None
    assert summarise([]).requests == 0


def test_goodput_counts_complete_answers_within_every_target() -> None:
    slow = record(index=1, last_s=record().first_s + 8.0)
    runs = [record(), slow, record(index=2, error="no room")]
    summary = summarise(runs, Targets(ttft_s=9.0, tpot_s=1.0))
    assert summary.slo_violations == 2
    assert summary.goodput_per_s == pytest.approx(1 / summary.span_s)
    assert summary.requests_per_s == pytest.approx(2 / summary.span_s)
    assert summarise(runs).goodput_per_s is None
