"""`morph quality` and `morph profile`: the server part measures, the client shows."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morph_client.cli import server_part
from morph_client.report.quality_plot import write_png
from morph_client.report.quality_table import series_name

Morph = Callable[..., Any]


def row(level: int, full: int, w8: int, w4: int, change: float) -> dict[str, float]:
    return {
        "level": level, "full": full, "w8": w8, "w4": w4, "layer_bytes_share": 1 - level / 8,
        "perplexity": 20 * (1 + change), "perplexity_change": change, "loss_change": change, "loss_change_error": 0.001,
        "kl": change, "kl_error": 0.0001, "top1": 1 - change,
    }  # fmt: skip


def report(**changes: Any) -> dict[str, Any]:
    rows = [row(2, 2, 0, 2, 0.01), row(4, 0, 0, 4, 0.0234)]
    series = [{"ladder": ["w4"], "order": "auto", "layer_order": [0, 1, 2, 3], "w4": "rtn", "rows": rows}]
    text = {"name": "t.txt", "sha256": "0" * 64, "windows": 2, "window_tokens": 64, "predicted_tokens": 126}
    head = {"model": "m", "layers": 4, "dtype": "bfloat16", "device": "cpu", "text": text}
    return {**head, "full": row(0, 4, 0, 0, 0.0), "series": series, **changes}


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for the server part: keeps its arguments, writes a report or an order file."""
    seen: list[list[str]] = []
    scores = [{"layer": i, "lts": 0.5, "lrs": 0.9, "mds": 0.99, "lis": 0.845} for i in (1, 0)]

    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        seen.append(command)
        out = next(text.removeprefix("--out=") for text in command if text.startswith("--out="))
        value = report() if command[3] == "quality" else {"rungs": {"w4": {"order": [1, 0], "scores": scores}}}
        Path(out).write_text(json.dumps(value))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(server_part.subprocess, "run", run)
    return seen


def test_quality_shows_a_table_and_leaves_figures_and_a_picture(
    morph: Morph, runtime: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "q.json"
    done = morph("quality", "/m", "--text", "/t", "--ladder", "w4", "--order", "random:1", "--order", "o.json",
                 "--levels", "2,4", "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (command,) = runtime
    assert command[:4] == [sys.executable, "-m", "morph_runtime.profile", "quality"]
    assert {"--ladder=w4", "--order=random:1", "--order=o.json", "--levels=2,4", "--text=/t"} <= set(command)
    assert command[-2:] == ["--", "/m"]
    assert "+2.34 %" in done.stdout and "97.7 %" in done.stdout and "126 predictions" in done.stdout
    assert json.loads(out.read_text()) == report()
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


def test_profile_shows_the_scores_and_says_how_to_use_the_order(
    morph: Morph, runtime: list[list[str]], tmp_path: Path
) -> None:
    done = morph("profile", "/m", "--text", "/t", "--out", tmp_path / "new", "--rung", "w4")
    assert done.exit_code == 0, done.stderr
    (command,) = runtime
    target = tmp_path / "new" / "order.json"
    assert f"--out={target}" in command and "--rung=w4" in command
    assert "0.845000" in done.stdout
    assert f"morph pack --order {target}" in done.stdout.replace("\n", "")


def test_the_server_parts_refusal_is_the_commands(
    morph: Morph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(server_part.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 2))
    assert morph("quality", "/m", "--text", "/t").exit_code == 2
    monkeypatch.setattr(server_part.subprocess, "run", lambda command: subprocess.CompletedProcess(command, -9))
    done = morph("profile", "/m", "--text", "/t", "--out", tmp_path / "o.json")
    assert done.exit_code == 1 and "ended by signal 9" in done.stderr


@pytest.mark.parametrize("command", [("quality",), ("profile", "--out=o")])
def test_without_the_server_part_measuring_names_the_remedy(
    morph: Morph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    done = morph(*command, "/m", "--text", "/t")
    assert done.exit_code == 2 and "pip install 'morphserve[server]'" in done.stderr


def test_an_output_that_cannot_be_written_is_told_before_anything_runs(
    morph: Morph, runtime: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = morph("quality", "/m", "--text", "/t", "--out", tmp_path / "file" / "q.json")
    assert done.exit_code == 2 and "cannot write" in done.stderr and not runtime


def test_the_demo_model_is_measured_in_a_process_of_the_server_part(morph: Morph, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    out = tmp_path / "q.json"
    few = ["--levels=12,24", "--windows=1", "--window-tokens=64", "--threads=1", f"--out={out}"]
    done = morph("quality", root / "models" / "morph-demo", "--text", root / "LICENSE", "--ladder=w8,w4", *few)
    assert done.exit_code == 0, done.stderr
    (one,) = json.loads(out.read_text())["series"]
    mild, deep = one["rows"]
    assert 0 < mild["kl"] < deep["kl"]
    assert f"{deep['perplexity']:.3f}" in done.stdout


def test_series_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    one = report()["series"][0]
    awq, back, w8 = {**one, "w4": "awq"}, {**one, "order": "back_to_front"}, {**one, "ladder": ["w8"], "w4": ""}
    several = report(series=[one, awq, back, w8])
    assert [series_name(several, each) for each in several["series"]] == [
        "W4, RTN, auto", "W4, AWQ, auto", "W4, RTN, back_to_front", "W8, auto"
    ]  # fmt: skip
    assert series_name(report(), one) == "W4"
    write_png(several, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
