from __future__ import annotations

import math
import socketserver
import threading

import pytest
from client_fakes import FakeTriton
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_client.errors import BadInput, ServerError, ServerUnavailable
from morph_client.prometheus import Histogram, parse, scrape

PAGE = """
# HELP morph_level k
# TYPE morph_level gauge
morph_level{model="morph",version="1"} 3
morph_layers{model="morph",rung="full"} 5
morph_layers{model="morph",rung="w4"} 3
morph_layers{model="other",rung="w4"} 9
up 1 1700000000000
nothing{} NaN
most +Inf
vllm:ttft_bucket{model="morph",le="0.1"} 2
vllm:ttft_bucket{model="morph",le="1"} 6
vllm:ttft_bucket{model="morph",le="+Inf"} 8
vllm:ttft_sum{model="morph"} 12.5
vllm:ttft_count{model="morph"} 8
"""


def test_values_are_found_by_name_and_labels() -> None:
    page = parse(PAGE)
    assert page.get("morph_level") == 3
    assert page.get("morph_layers", rung="w4", model="morph") == 3
    assert page.get("morph_layers", model="morph") == 8
    assert page.by_label("morph_layers", "rung", model="morph") == {"full": 5, "w4": 3}
    assert page.get("up") == 1 and page.get("most") == math.inf
    assert math.isnan(page.get("nothing") or 0.0)


def test_an_absent_metric_is_none_and_not_zero() -> None:
    page = parse(PAGE)
    assert page.get("morph_level", model="other") is None
    assert page.histogram("absent") is None
    assert page.by_label("absent", "x") == {}


def test_only_the_wanted_names_are_kept() -> None:
    page = parse(PAGE, ("morph_",))
    assert page.get("morph_level") == 3 and page.get("up") is None


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True),
        st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=20),
        max_size=4,
    ),
    st.floats(allow_nan=False),
)
def test_any_labels_and_value_survive_the_format(labels: dict[str, str], value: float) -> None:
    def escaped(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
    (sample,) = parse(f"a:b_c{{{inside}}} {value!r}").samples("a:b_c")
    assert sample.labels == labels and sample.value == value


def test_a_newline_in_a_label_is_read_back() -> None:
    (sample,) = parse(r'x{y="one\ntwo"} 1').samples("x")
    assert sample.labels["y"] == "one\ntwo"


@pytest.mark.parametrize("line", ["<html>", "name", "name{a=b} 1", 'name{a="b} 1', "name x"])
def test_a_line_off_the_format_is_named_by_its_number(line: str) -> None:
    with pytest.raises(ServerError, match="line 2"):
        parse(f"ok 1\n{line}\n")


def test_a_quantile_is_linear_within_its_bucket() -> None:
    histogram = parse(PAGE).histogram("vllm:ttft", model="morph")
    assert histogram is not None and histogram.count == 8 and histogram.total == 12.5
    assert histogram.quantile(0.125) == pytest.approx(0.05)
    assert histogram.quantile(0.5) == pytest.approx(0.55)
    assert histogram.quantile(0.99) == 1.0  # at least that: it lies beyond the last bound


def test_a_histogram_counts_what_came_after_an_earlier_one() -> None:
    before = Histogram((1.0, math.inf), (2, 4), 3.0)
    assert Histogram((1.0, math.inf), (5, 9), 8.0).since(before) == Histogram((1.0, math.inf), (3, 5), 5.0)
    restarted = Histogram((1.0, math.inf), (1, 1), 0.5)
    assert restarted.since(before) == restarted
    assert Histogram((1.0, math.inf), (0, 0), 0.0).quantile(0.5) is None


def test_a_page_is_fetched(triton: FakeTriton) -> None:
    assert scrape(triton.metrics_url).get("morph_level") == 0


def test_an_address_that_serves_no_metrics_is_explained(triton: FakeTriton) -> None:
    with pytest.raises(ServerError, match="404"):
        scrape(triton.metrics_url + "/x")
    with pytest.raises(ServerUnavailable, match="localhost:9"):
        scrape("http://localhost:9/metrics")
    with pytest.raises(ServerUnavailable):
        scrape(f"http://{triton.url}/metrics", timeout_s=2)  # the gRPC port does not speak HTTP/1
    for address in ("localhost:8002", "ftp://x/", "http://host:port/"):
        with pytest.raises(BadInput, match="metrics page"):
            scrape(address)


class Binary(socketserver.BaseRequestHandler):
    """Answers as a gRPC port does: HTTP/2 settings, whatever is asked."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"\x00\x00\x18\x04\x00\x00\x00\x00\x00\x00\x04\x00@\x00\x00\n")


def test_a_port_of_another_kind_is_told_without_its_bytes() -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), Binary) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(ServerUnavailable, match=r"\(what answers there does not speak HTTP/1\)"):
            scrape(f"http://127.0.0.1:{server.server_address[1]}/metrics")
