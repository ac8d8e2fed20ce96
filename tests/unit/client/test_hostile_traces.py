"""A trace file is somebody else's data: it is read, or refused with one sentence."""

from __future__ import annotations

import math
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from morph_client.errors import BadInput
from morph_client.traces import read_trace

HEADERS = st.sampled_from(
    [
        "arrival_s,prompt_tokens,output_tokens",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "a,b",
        "",
    ]
)
CELLS = st.one_of(
    st.integers(-3, 10**6).map(str),
    st.floats().map(str),
    st.sampled_from(["", "nan", "inf", "1e999", "9" * 5000, "2023-11-16 18:15:46.68", "0x10", '"', "\x00", "١", "1_0"]),
    st.text(max_size=5),
)
TABLES = st.tuples(HEADERS, st.lists(st.lists(CELLS, max_size=6).map(",".join), max_size=5)).map(
    lambda table: "\n".join([table[0], *table[1]]).encode("utf-8", "surrogatepass")
)


def one_sentence(text: str) -> None:
    text.encode("utf-8")
    assert "\n" not in text and len(text) < 1000


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(TABLES | st.binary(max_size=120), st.booleans())
def test_any_file_is_a_trace_or_refused(tmp_path: Path, content: bytes, skip: bool) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(content)
    try:
        trace = read_trace(path, skip_zero_tokens=skip)
    except BadInput as error:
        one_sentence(str(error))
        return
    times = [request.arrival_s for request in trace.requests]
    assert times and times == sorted(times) and all(math.isfinite(at) and at >= 0 for at in times)
    assert all(request.prompt_tokens >= 1 and request.output_tokens >= 1 for request in trace.requests)
