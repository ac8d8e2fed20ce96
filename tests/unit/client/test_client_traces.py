from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_client.errors import BadInput
from morph_client.traces import Trace, TraceRequest, clip, cut_window, read_trace, speed_up, thin

lengths = st.integers(min_value=1, max_value=100_000)
rows = st.lists(st.tuples(st.floats(min_value=0, max_value=1e6), lengths, lengths), min_size=1, max_size=40)


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def trace(*arrivals: float) -> Trace:
    return Trace("t.csv", "morph", tuple(TraceRequest(at, 10, 20) for at in arrivals))


@settings(deadline=None)  # a busy machine is no failure
@given(rows)
def test_our_own_format_is_read_back_exactly(found: list[tuple[float, int, int]]) -> None:
    found.sort()
    lines = "".join(f"{at!r},{prompt},{output}\n" for at, prompt, output in found)
    with tempfile.TemporaryDirectory() as folder:
        read = read_trace(file(Path(folder), f"arrival_s,prompt_tokens,output_tokens\n{lines}"))
    assert read.format == "morph"
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in read.requests] == found


@settings(deadline=None)  # a busy machine is no failure
@given(rows, st.permutations(["Timestamp", "Model", "Request tokens", "Response tokens", "Log Type"]))
def test_burstgpt_columns_are_read_by_name(found: list[tuple[float, int, int]], header: list[str]) -> None:
    found.sort()
    lines = []
    for at, prompt, output in found:
        cells = {"Timestamp": str(int(at)), "Request tokens": str(prompt), "Response tokens": str(output)}
        lines.append(",".join(cells.get(name, "x") for name in header))
    with tempfile.TemporaryDirectory() as folder:
        read = read_trace(file(Path(folder), "\n".join([",".join(header), *lines])))
    assert read.format == "burstgpt" and read.requests[0].arrival_s == 0.0
    assert [r.prompt_tokens for r in read.requests] == [prompt for _, prompt, _ in found]


def test_azure_stamps_become_seconds_from_the_first(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 23:59:59.9799600,4808,10\n2023-11-17 00:00:01.0000000,3180,8\n2023-11-17 00:00:02,110,27\n"
    )
    read = read_trace(file(tmp_path, text))
    assert read.format == "azure-2023"
    assert [r.arrival_s for r in read.requests] == pytest.approx([0.0, 1.02004, 2.02004], abs=1e-5)


def test_blank_lines_spaces_and_a_byte_order_mark_are_forgiven(tmp_path: Path) -> None:
    read = read_trace(file(tmp_path, "\ufeffarrival_s, prompt_tokens,output_tokens\n\n 1.5 , 3,4\n\n"))
    assert read.requests == (TraceRequest(1.5, 3, 4),)


@pytest.mark.parametrize(
    ("row", "column", "why"),
    [
        ("x,1,1", "arrival_s", "not a time"),
        ("nan,1,1", "arrival_s", "not a time"),
        ("-1,1,1", "arrival_s", "negative"),
        ("0.5,1,1", "arrival_s", "earlier than the row before"),
        ("2,0,1", "prompt_tokens", "0 tokens"),
        ("2,1,0", "output_tokens", "0 tokens"),
        ("2,-4,1", "prompt_tokens", "-4 tokens"),
        ("2,1.5,1", "prompt_tokens", "not a whole number"),
        ("2,1", "output_tokens", "missing"),
    ],
)
def test_a_bad_row_is_named_by_line_and_column(tmp_path: Path, row: str, column: str, why: str) -> None:
    with pytest.raises(BadInput, match=rf"line 3, column '{column}': .*{why}") as caught:
        read_trace(file(tmp_path, f"arrival_s,prompt_tokens,output_tokens\n1,1,1\n{row}\n"))
    assert "\n" not in str(caught.value)


def test_rows_of_no_tokens_can_be_dropped(tmp_path: Path) -> None:
    path = file(tmp_path, "Timestamp,Request tokens,Response tokens\n5,0,0\n6,10,2\n9,11,3\n")
    assert [r.arrival_s for r in read_trace(path, skip_zero_tokens=True).requests] == [0.0, 3.0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no trace format"),
        ("a,b,c\n1,2,3\n", "no trace format"),
        ("arrival_s,prompt_tokens\n1,2\n", "column 'output_tokens' is missing"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no requests"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        read_trace(file(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_trace(tmp_path / "absent.csv")
    with pytest.raises(BadInput, match="cannot read"):
        read_trace(tmp_path)
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="UTF-8"):
        read_trace(path)


def test_a_window_keeps_its_requests_and_moves_them_to_its_start() -> None:
    cut = cut_window(trace(0, 5, 6, 9.5, 20), 5, 5)
    assert [r.arrival_s for r in cut.requests] == [0, 1, 4.5]
    assert len(cut_window(trace(0, 5, 6), 0, None).requests) == 3


@pytest.mark.parametrize(("offset", "window"), [(30, 5), (-1, 5), (0, 0)])
def test_an_empty_or_impossible_window_is_refused(offset: float, window: float) -> None:
    with pytest.raises(BadInput):
        cut_window(trace(0, 5, 20), offset, window)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(min_value=1, max_value=200), st.floats(min_value=1, max_value=50), st.integers())
def test_thinning_keeps_one_in_k_in_order_and_repeatably(count: int, factor: float, seed: int) -> None:
    whole = trace(*range(count))
    kept = thin(whole, factor, seed)
    assert len(kept.requests) == max(1, round(count / factor))
    assert list(kept.requests) == sorted(kept.requests, key=lambda r: r.arrival_s)
    assert set(kept.requests) <= set(whole.requests) and kept == thin(whole, factor, seed)


def test_speed_and_limits() -> None:
    assert [r.arrival_s for r in speed_up(trace(0, 10), 4).requests] == [0, 2.5]
    assert clip(trace(0), 4, 50).requests == (TraceRequest(0, 4, 20),)
    assert clip(trace(0), None, None) == trace(0)
    for wrong in (lambda: speed_up(trace(0), 0), lambda: thin(trace(0), 0.5, 0), lambda: clip(trace(0), 0, None)):
        with pytest.raises(BadInput):
            wrong()
