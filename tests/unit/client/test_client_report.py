from __future__ import annotations

import builtins
import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from morph_client.demo_load import DemoLoad
from morph_client.errors import BadInput, MissingDependency
from morph_client.palette import Theme, dark
from morph_client.prometheus import Metrics
from morph_client.report import files, html, plot, table
from morph_client.report.data import Run, run_to_json
from morph_client.sampler import TimedState
from morph_client.state import ServerState
from morph_client.stats import RequestRecord, summarise
from morph_client.types import RungShare

LOAD = DemoLoad().lasting(9)


def run(mode: str, ttft: float, level: int = 0, error: str | None = None, samples: bool = True) -> Run:
    empty = ServerState.read(Metrics([]))
    records = [
        RequestRecord(
            i, r.arrival_s, r.arrival_s, 9, 5, r.arrival_s + ttft, r.arrival_s + ttft + 1, 0 if level else 5, level,
            RungShare(1 - level / 10, 0, level / 10), error,
        )
        for i, r in enumerate(LOAD.requests())
    ]  # fmt: skip
    states = [
        TimedState(
            t * 0.5,
            replace(empty, level=level, level_max=10, kv_capacity=50 + level, kv_used=30, kv_base=50, pending=3,
                    kv_block_tokens=16),
        )
        for t in range(20)
    ]  # fmt: skip
    return Run(
        mode, "morphing" if level else "full precision only", records, summarise(records), states if samples else []
    )


def picture(*runs: Run, **changes: Any) -> plot.Picture:
    return replace(plot.Picture("A burst", "what came of it " * 12, runs, LOAD.spans), **changes)


@pytest.mark.parametrize("samples", [True, False])
def test_a_picture_is_drawn_with_and_without_samples(tmp_path: Path, samples: bool) -> None:
    path = tmp_path / "x.png"
    shown = picture(run("off", 3, samples=samples), run("balanced", 1, 5, samples=samples))
    plot.write_png(shown, path, dark())
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_a_replay_is_drawn_without_phases_and_without_any_answer(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    silent = replace(run("off", 1), records=[], states=[])
    plot.write_png(picture(silent, spans=(), panels=("load", "ttft", "queue", "level", "kv")), path)
    assert path.stat().st_size > 10_000


class _Balanced(HTMLParser):
    """Fails on a tag that is closed without being open."""

    void = frozenset({"meta", "path", "use", "rect", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_follows_the_readers_theme() -> None:
    runs = [run("off", 3), run("balanced", 1, 5)]
    page = html.render(
        html.Page(
            "A <burst>", "it helped & more", [r.label for r in runs], table.comparison_rows(runs),
            [plot.themed_svgs(picture(*runs))], [html.Log("Log", "what <it> is", ["▼ level 0 → 4"])], "morph x", ["n"],
        )
    )  # fmt: skip
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|\burl\((?!#)", page)
    assert "prefers-color-scheme: dark" in page and "A &lt;burst&gt;" in page and "it helped &amp; more" in page
    for item in fields(Theme):
        assert f"--{item.name}:" in page and (f"var(--{item.name})" in page)
    assert set(re.findall(r"var\(--(\w+)\)", page)) <= {item.name for item in fields(Theme)}
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == []


def test_a_page_can_do_without_a_picture() -> None:
    runs = [run("off", 3), run("balanced", 1, 5)]
    assert "<svg" not in html.render(html.Page("t", "v", ["a", "b"], table.comparison_rows(runs)))


def test_a_missing_matplotlib_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_matplotlib(name: str, *args: Any) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(plot.importlib, "import_module", no_matplotlib)
    with pytest.raises(MissingDependency, match=r"pip install 'morphserve\[plots\]'"):
        plot.require_matplotlib()
    assert builtins.__import__  # the patch is on this package's importer only


@pytest.mark.parametrize(
    ("off", "on", "says"),
    [
        (run("off", 3), run("balanced", 1, 5), "cut the p95 time to first token by 67 %"),
        (run("off", 1), run("balanced", 3, 5), "did not help here"),
        (run("off", 1), run("balanced", 1, 5), "no real difference"),
        (run("off", 3), run("balanced", 1, 0), "never morphed"),
        (run("off", 3), run("balanced", 1, 5, error="x"), "enough complete answers"),
    ],
)
def test_the_verdict_is_honest(off: Run, on: Run, says: str) -> None:
    said = table.verdict(off, on)
    assert says in said and said.endswith(".") and said.count(". ") == 0


def test_more_failures_are_no_success() -> None:
    on = run("balanced", 1, 5)
    worse = replace(on, records=on.records, summary=replace(on.summary, errors=4))
    assert "4 more requests failed" in table.verdict(run("off", 3), worse)


def test_tables_fit_80_columns() -> None:
    runs = [run("off", 3), run("balanced", 1, 5)]
    for rows in (table.comparison_rows(runs), table.summary_rows(runs)):
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(table.render(rows, runs))
        text = console.export_text()
        assert "TTFT p95" in text and "…" not in text
        assert max(len(line) for line in text.splitlines()) <= 80


def test_figures_read_well() -> None:
    assert [table.seconds(x) for x in (None, 0.0234, 0.9999, 12)] == ["–", "23 ms", "1.00 s", "12.00 s"]
    assert [table.percent(x) for x in (None, 0, 0.5, 0.99999, 1)] == ["–", "0 %", "50.0 %", "> 99.9 %", "100 %"]


def test_the_json_form_keeps_every_request_and_sample() -> None:
    one = run("balanced", 1, 5)
    value = json.loads(json.dumps(run_to_json(one)))
    assert len(value["requests"]) == len(one.records) and len(value["samples"]) == 20
    assert value["max_level"] == 5 and value["max_kv_blocks"] == 55 and value["max_queue"] == 3
    assert value["requests"][0]["ttft_s"] == pytest.approx(1.0)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wrong in (
        lambda: files.make_folder(tmp_path / "file" / "x"),
        lambda: files.check_writable(tmp_path / "file" / "x"),
        lambda: files.write_json(tmp_path, {}),
    ):
        with pytest.raises(BadInput, match="cannot write"):
            wrong()
