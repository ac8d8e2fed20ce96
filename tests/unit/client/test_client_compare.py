"""``morph compare``: configurations, interleaving, figures over repeats, and a whole comparison on a fake Triton."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from client_fakes import FakeTriton
from rich.console import Console
from test_client_report import run

from morph_client.aio_client import AsyncMorphClient
from morph_client.compare.configurations import interleaved, parse
from morph_client.compare.fit import busiest_rate, fitted_speed
from morph_client.compare.level_loss import LevelLosses
from morph_client.compare.result import OneRun, build
from morph_client.compare.scoring import Score, Scorer, change, quality
from morph_client.errors import BadInput
from morph_client.report import compare_table
from morph_client.stats import Targets, summarise
from morph_client.traces import TraceRequest

Morph = Callable[..., Any]


def sentence(result: Any) -> str:
    lines = result.stderr.strip().splitlines()
    assert result.exit_code != 0 and len(lines) == 1 and lines[0].startswith("morph: "), result.stderr
    return str(lines[0])


def test_configurations_are_settings_of_the_server_alone() -> None:
    full, w8, own, general = parse("full, w8,balanced:w8+w4,performance", "w4")
    assert full.environment == {"MORPH_LADDER": "w4", "MORPH_PIN": "full", "MORPH_MODE": "off"}
    assert w8.environment == {"MORPH_LADDER": "w8", "MORPH_PIN": "w8", "MORPH_MODE": "off", "MORPH_AWQ": ""}
    assert own.environment == {"MORPH_LADDER": "w8,w4", "MORPH_PIN": "", "MORPH_MODE": "balanced"}
    assert general.ladder == "w4" and general.morphs and not w8.morphs
    assert len({c.label for c in (full, w8, own, general)}) == 4


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("w4,balanced", "needs 'full'"),
        ("full,fast", "no configuration 'fast'"),
        ("full,full", "once"),
        ("full,balanced:w4+w8", "no ladder"),
        ("full,balanced:w2", "no ladder"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(names: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(names, "w4")


def test_each_repeat_has_every_configuration_and_begins_with_another() -> None:
    chosen = parse("full,w4,balanced", "w4")
    order = interleaved(chosen, 3)
    assert [[c.name for r, c in order if r == repeat] for repeat in range(3)] == [
        ["full", "w4", "balanced"],
        ["w4", "balanced", "full"],
        ["balanced", "full", "w4"],
    ]
    with pytest.raises(BadInput, match="at least 1 repeat"):
        interleaved(chosen, 0)


def test_a_trace_is_fitted_by_its_busiest_stretch() -> None:
    burst = [TraceRequest(100 + i, 1, 50) for i in range(10)]
    requests = [TraceRequest(0.0, 1, 900), *burst, TraceRequest(111.0, 1, 900)]
    assert busiest_rate(requests) == pytest.approx((8 * 50 + 900) / 10)
    assert fitted_speed(burst, 100.0, 1.5) == 3.0
    for share in (0.0, math.nan, -1.0):
        with pytest.raises(BadInput, match="must be positive"):
            fitted_speed(burst, 100.0, share)


def test_the_loss_by_levels_is_that_of_the_tokens(tmp_path: Path) -> None:
    rows = [{"level": 2, "loss_change": 0.02}, {"level": 4, "loss_change": 0.1}]
    table = tmp_path / "quality.json"
    table.write_text(json.dumps({"series": [{"ladder": ["w4"], "rows": rows}, {"ladder": ["w8", "w4"], "rows": rows}]}))
    losses = LevelLosses.read(table)
    assert losses.change("w4", {0: 50, 3: 50}) == pytest.approx(math.expm1(0.03))
    assert losses.change("w4", {0: 9}) == 0.0
    assert losses.change("w8", {2: 1}) == pytest.approx(math.expm1(0.02)), "W8 alone is the first part of w8,w4"
    assert (
        losses.change("w4", {}) is None and losses.change("w4", {9: 1}) is None and losses.change("w2", {0: 1}) is None
    )
    table.write_text("{}")
    with pytest.raises(BadInput, match="not what 'morph quality --out' writes"):
        LevelLosses.read(table)


def test_perplexity_is_over_tokens_and_its_change_over_pairs() -> None:
    own = {0: Score(10, 22.0), 1: Score(30, 66.0), 5: Score(1, 9.0)}
    full = {0: Score(10, 20.0), 1: Score(30, 60.0)}
    told = quality(own)
    assert told is not None and told.outputs == 3 and told.perplexity == pytest.approx(math.exp(97 / 41))
    found = change(own, full)
    assert found is not None
    assert found[0] == pytest.approx(math.expm1(0.2)) and found[1] == pytest.approx(0.0, abs=1e-9)
    assert quality({}) is None and change(own, {0: Score(10, 20.0)}) is None


async def test_an_output_is_scored_once_and_only_its_own_tokens(
    triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    from morph_client.types import TokenLogprob

    asked: list[str] = []

    async def generate(_client: AsyncMorphClient, prompt: str, **_: Any) -> Any:
        asked.append(prompt)
        scores = [None, *((TokenLogprob(1, "x", -float(i), 1),) for i in range(1, 6))]
        return type("Answer", (), {"prompt_logprobs": tuple(scores)})

    monkeypatch.setattr(AsyncMorphClient, "generate", generate)
    async with AsyncMorphClient(triton.url) as client:
        scorer = Scorer(client)
        first = await scorer.score([("prompt", 4, " a b"), ("prompt", 4, " a b")])
        assert first == [Score(2, 9.0)] * 2 and await scorer.score([("prompt", 4, " a b")]) == first[:1]
    assert asked == ["prompt a b"]


def finished(name: str, repeat: int, ttft: float, level: int, nll: float) -> OneRun:
    chosen = {c.name: c for c in parse("full,w4,balanced", "w4")}
    one = run("balanced", ttft, level)
    records = [replace(r, text=f"same {name if i % 2 else ''}") for i, r in enumerate(one.records)]
    one = replace(one, records=records, summary=summarise(records, Targets(2.0)))
    return OneRun(chosen[name], repeat, one, {i: Score(10, nll * 10 + 0.1 * (i % 3)) for i in range(len(records))})


@pytest.fixture
def result() -> dict[str, Any]:
    """Three configurations, two repeats; morphing is 5 and 6 times better than full precision."""
    runs = [
        finished("full", 0, 5.0, 0, 3.0), finished("w4", 0, 0.9, 5, 3.05), finished("balanced", 0, 1.0, 3, 3.01),
        finished("full", 1, 6.0, 0, 3.0), finished("w4", 1, 0.9, 5, 3.05), finished("balanced", 1, 1.0, 3, 3.01),
    ]  # fmt: skip
    told = build(runs, parse("full,w4,balanced", "w4"))
    told.update(trace="t.csv", described="all of it", model="m", machine="x", command="morph compare t.csv")
    return json.loads(json.dumps(told))


def test_figures_are_medians_and_ratios_are_within_a_repeat(result: dict[str, Any]) -> None:
    full, w4, balanced = result["configurations"]
    assert balanced["figures"]["ttft_p95_ratio"] == {
        "median": pytest.approx(5.5), "min": pytest.approx(5.0), "max": pytest.approx(6.0),
    }  # fmt: skip
    assert full["figures"]["ttft_p95_ratio"]["median"] == 1.0
    assert balanced["figures"]["slo_violations_change"]["median"] == -1.0
    assert full["figures"]["equal_to_full"]["median"] == 1.0
    assert balanced["figures"]["equal_to_full"]["median"] == pytest.approx(0.5, abs=0.2)
    assert w4["perplexity_change"]["mean"] == pytest.approx(math.expm1(0.05))
    assert balanced["perplexity_change"]["mean"] == pytest.approx(math.expm1(0.01))


def test_the_table_shows_the_papers_figures_and_the_spread(result: dict[str, Any]) -> None:
    rows = {row.name: row.values for row in compare_table.rows(result)}
    assert rows["  p95, full / this (paper: 2.9–15.7 ×)"][2] == "5.50 ×"
    assert "  against full (paper: -92.5 %)" in rows
    assert rows["  least to most"]
    assert "5.00–6.00" in str([row.values for row in compare_table.rows(result)])
    said = compare_table.headline(result)
    assert "1.00 s, 5.5 times better than full precision (5.50 s), static W4 900 ms" in said
    assert "static W4 +5.1 ±" in said


def test_the_table_loses_no_figure_in_80_columns(result: dict[str, Any]) -> None:
    result["configurations"] += result["configurations"]  # six columns are more than fit
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*compare_table.render(result, 80))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    shown = " ".join(line for line in text.splitlines() if line.startswith("TTFT p95"))
    assert shown.split("TTFT p95")[1].split() == ["5.50", "s", "900", "ms", "1.00", "s", "5.50", "s"]
    assert shown.split("TTFT p95")[2].split() == ["900", "ms", "1.00", "s"]


def test_a_loss_is_told_as_a_loss(result: dict[str, Any]) -> None:
    for value in result["configurations"][2]["figures"]["ttft_p95_ratio"]:
        result["configurations"][2]["figures"]["ttft_p95_ratio"][value] = 0.5
    assert "2.00 times worse than full precision" in compare_table.headline(result)
    result["configurations"][2]["figures"]["max_level"]["median"] = 0
    assert "the load never needed a change" in compare_table.headline(result)


def test_a_whole_comparison_leaves_table_figures_and_page(
    morph: Morph, launcher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,9,3\n0.05,9,3\n0.1,9,3\n")
    out = tmp_path / "out"
    done = morph("compare", trace, "--configs", "full,balanced", "--repeats", 1, "--score", 0, "--out", out)
    assert done.exit_code == 0, done.stderr
    for part in ("2 of 2", "paper: 2.9–15.7 ×", "Morphing, balanced"):
        assert part in done.stdout
    figures = json.loads((out / "result.json").read_text())
    assert figures["order"] == ["full", "balanced"] and figures["machine"]
    assert [len(c["runs"]) for c in figures["configurations"]] == [1, 1]
    page = (out / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page and "morph compare" in page and "What the controller did" in page
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (out / "runs").iterdir()} == {"full-1.json", "balanced-1.json"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "absent"], "the model folder absent does not exist"),
        (["--configs", "w4"], "needs 'full'"),
        (["--repeats", "0"], "at least 1 repeat"),
        (["--ttft-slo", "0"], "TTFT target must be a positive"),
        (["--fit", "0"], "must be positive"),
        (["--quality", "absent.json"], "cannot read absent.json"),
    ],
)
def test_bad_input_is_one_sentence_before_any_server_starts(
    morph: Morph, tmp_path: Path, arguments: list[str], says: str
) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,9,3\n")
    assert says in sentence(morph("compare", trace, "--out", tmp_path / "out", *arguments))
