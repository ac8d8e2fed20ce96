from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from client_fakes import FakeService
from rich.console import Console

from morph_client.cli.top_frame import frame
from morph_client.cli.top_history import History
from morph_client.prometheus import Histogram, Metrics, parse
from morph_client.state import ServerState


def state(level: int = 3) -> ServerState:
    return ServerState.read(parse(FakeService(level=level).metrics_page()))


def drawn(history: History, width: int = 80, encoding: str = "utf-8") -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = Console(file=out, width=width)
    console.print(frame(history, "http://localhost:8002/metrics", console))
    out.flush()
    raw = out.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode(encoding)


def history(*states: ServerState, step_s: float = 1.0) -> History:
    one = History()
    for i, each in enumerate(states):
        one.add(i * step_s, each)
    return one


def test_the_state_is_read_from_the_wire_contracts_names() -> None:
    now = state(3)
    assert (now.level, now.level_max, now.mode, now.engine_up) == (3, 8, "balanced", True)
    assert now.layer_bits == (4, 4, 4, 16, 16, 16, 16, 16)
    assert (now.kv_capacity, now.kv_base, now.kv_block_tokens) == (88, 64, 16)
    assert now.decisions == {("down", "kv_pressure"): 3, ("hold", "slo_met"): 900}


def test_a_server_without_our_metrics_gives_an_empty_state() -> None:
    now = ServerState.read(Metrics([]))
    assert now.level is None and now.layer_bits == () and now.queued == 0 and now.ttft is None


def test_layers_stay_in_order_when_there_are_more_than_ten() -> None:
    page = "\n".join(f'morph_layer_bits{{model="morph",layer="{i}"}} {4 if i == 10 else 16}' for i in range(12))
    assert ServerState.read(parse(page)).layer_bits == (16,) * 10 + (4, 16)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("layers", [8, 12, 32, 80, 126])
def test_a_page_fits_its_width_whatever_the_number_of_layers(width: int, layers: int) -> None:
    text = drawn(history(replace(state(), layer_bits=(4,) * 3 + (16,) * (layers - 3))), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert f"full {layers - 3}" in text and "w4 3" in text


def test_a_page_shows_what_an_operator_asks_for() -> None:
    text = drawn(history(state(3)))
    for part in (
        "mode balanced", "KV int8", "3 of 8", "0 of 88 blocks used (0 %), 24 of them won by morphing", "0 in Triton",
        "p50   100 ms", "since the start", "3 down", "kv_pressure", "engine up",
        "weights 100 · workspace 100 of 200 MiB",
    ):  # fmt: skip
        assert part in text
    assert "\x1b" not in text


def test_an_empty_page_is_drawn_too() -> None:
    assert "Level" in drawn(history(ServerState.read(Metrics([]))))


def test_a_terminal_without_unicode_gets_letters() -> None:
    text = drawn(history(state(3)), encoding="ascii")
    assert "444" in text.replace(" ", "")[:600] and "F full 5" in text


def test_an_engine_that_is_down_and_a_lost_server_are_said() -> None:
    one = history(replace(state(), engine_up=False))
    one.lost("no metrics page answers")
    text = drawn(one)
    assert "engine down" in text and "no metrics page answers" in text
    one.add(2.0, state())
    assert "no metrics page" not in drawn(one)


def test_rates_and_quantiles_are_those_of_the_window() -> None:
    bounds = (0.1, 1.0, math.inf)
    before = replace(state(), generated_tokens=100, ttft=Histogram(bounds, (50, 50, 50), 1.0))
    after = replace(state(), generated_tokens=180, ttft=Histogram(bounds, (50, 60, 60), 9.0))
    one = history(before, after, step_s=2.0)
    assert one.tokens_per_s == pytest.approx(40)
    assert one.ttft.p50 == pytest.approx(0.55)
    assert one.window_s == 2.0


def test_the_window_slides() -> None:
    one = history(*(replace(state(), generated_tokens=10 * i) for i in range(100)))
    assert one.window_s == pytest.approx(30)
    assert one.tokens_per_s == pytest.approx(10)


def test_decisions_are_listed_newest_first_without_the_holds() -> None:
    first = replace(state(), decisions={("down", "a"): 1, ("hold", "h"): 5})
    second = replace(state(), decisions={("down", "a"): 3, ("hold", "h"): 90})
    third = replace(second, decisions={**second.decisions, ("up", "b"): 1})
    one = history(first, second, third)
    assert [(d.action, d.reason, d.count) for d in one.decisions()] == [("up", "b", 1), ("down", "a", 2)]
    assert one.age_s(one.decisions()[1]) == 1.0


def test_a_narrow_page_leaves_notes_out_and_keeps_the_figures() -> None:
    text = drawn(history(state(3)), 60)
    assert max(len(line) for line in text.splitlines()) == 60
    assert "p50   100 ms" in text and "3 down · 0 up" in text and "since the start" not in text.split("Shifts")[1]


def test_the_target_stands_in_the_title_where_the_server_tells_it() -> None:
    assert "target 2.5 s" in drawn(history(replace(state(3), ttft_slo_s=2.5)))
    assert "target" not in drawn(history(replace(state(3), ttft_slo_s=None)))
