"""`morph simulate`: the client cuts the trace, the server part simulates, the client shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morph_client.report.simulate_plot import _rates

PROFILE = Path(__file__).resolve().parents[3] / "bench/simulate/profiles/h200_llama-2-7b_24gib.json"


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    rows = [f"{i / 50},512,{16 + i % 9}" for i in range(60)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows, "99,100000,1"]) + "\n")
    return path


def test_simulate_shows_tables_and_leaves_figures_and_a_picture(
    morph: Callable[..., Any], csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "s.json"
    done = morph("simulate", csv, "--profile", PROFILE, "--window", "10", "--static", "full", "--sweep", "dwell=1",
                 "--replicas", "auto", "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["trace"]["requests"] == 60
    assert [run["label"] for run in report["runs"]] == ["static full", "balanced"]
    assert "60 requests" in done.stdout and "static full" in done.stdout and "dwell" in done.stdout
    assert "GPU hours" in done.stdout
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_no_figure_is_cut_at_eighty_columns(
    morph: Callable[..., Any], csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = morph("simulate", csv, "--profile", PROFILE, "--window", "10", "--ablation", "--sweep", "dwell=1",
                 "--replicas", "1")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    heads = ("TTFT p50", "p99", "TPOT p95", "goodput/s", "full/w8/w4", "preempted", "turns", "GPU hours")
    assert "…" not in done.stdout and all(head in done.stdout for head in heads)
    assert done.stdout.count("balanced, precision only") == 2  # in both halves of the table of runs
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80


def test_a_request_that_does_not_fit_is_told_by_the_server_part(morph: Callable[..., Any], csv: Path) -> None:
    done = morph("simulate", csv, "--profile", PROFILE)
    assert done.exit_code == 2


def test_the_load_of_a_short_trace_is_counted_by_the_second() -> None:
    line = {"at_s": [0.125 + i / 4 for i in range(10)], "arrivals_per_s": [0, 0, 0, 4, 0, 0, 8, 4, 4, 0]}
    starts, rates = _rates(line)
    assert starts == [0, 1, 2, 2.5] and rates == [1, 3, 2, 2]
