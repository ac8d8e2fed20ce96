from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client_fakes import CACHED_TOKENS, FakeTriton

from morph_client.cli import serve

Morph = Callable[..., Any]


def sentence(result: Any) -> str:
    """The one line on standard error; fails if there is anything else there, a traceback above all."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("morph: "), result.stderr
    return str(lines[0])


def trace(tmp_path: Path, rows: str = "0,20,3\n0.05,30,4\n0.1,10,2\n") -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    return path


def test_help_lists_the_commands(morph: Morph) -> None:
    text = morph("--help").stdout
    for name in ("serve", "generate", "chat", "top", "replay", "demo", "quantize", "pack"):
        assert name in text


def test_generate_prints_the_text_alone(morph: Morph, triton: FakeTriton) -> None:
    result = morph("generate", "say it", "--url", triton.url, "--max-tokens", 3)
    assert result.exit_code == 0 and result.stdout == "w0 w1 w2 \n" and result.stderr == ""


def test_generate_sends_its_options(morph: Morph, triton: FakeTriton) -> None:
    morph("generate", "x", "--url", triton.url, "--max-tokens", 1, "--temperature", 0.5, "--top-p", 0.9, "--top-k", 4,
          "--seed", 7, "--stop", "a", "--stop", "b", "--no-stream")  # fmt: skip
    message = triton.service.requests[0]
    inputs = {t.name: raw for t, raw in zip(message.inputs, message.raw_input_contents, strict=True)}
    assert json.loads(inputs["sampling_parameters"][4:]) == {
        "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 7, "stop": ["a", "b"],
    }  # fmt: skip
    assert "stream" not in inputs


def test_generate_can_print_json(morph: Morph, triton: FakeTriton) -> None:
    answer = json.loads(morph("generate", "x", "--url", triton.url, "--max-tokens", 2, "--json").stdout)
    assert answer["text"] == "w0 w1 " and answer["levels"] == [0, 0] and answer["rung_share"]["full"] == 1


def test_generate_prints_each_of_n_outputs(morph: Morph, triton: FakeTriton) -> None:
    result = morph("generate", "x", "--url", triton.url, "--max-tokens", 2, "-n", 2)
    assert result.stdout == "--- 1 of 2 (length)\nw0 w1 \n--- 2 of 2 (length)\n1:w0 1:w1 \n"
    answer = json.loads(morph("generate", "x", "--url", triton.url, "--max-tokens", 2, "-n", 3, "--json").stdout)
    assert [output["text"] for output in (answer, *answer["more"])] == ["w0 w1 ", "1:w0 1:w1 ", "2:w0 2:w1 "]
    assert answer["num_cached_tokens"] == CACHED_TOKENS and answer["num_output_tokens"] == 2


@pytest.mark.parametrize(("prompt", "status"), [("refuse", 2), ("full", 1), ("dropped", 130), ("cut", 1)])
def test_an_error_is_one_sentence_and_a_status(morph: Morph, triton: FakeTriton, prompt: str, status: int) -> None:
    result = morph("generate", prompt, "--url", triton.url)
    assert result.exit_code == status and sentence(result)


def test_without_a_server_the_remedy_is_named(morph: Morph) -> None:
    result = morph("generate", "x", "--url", "localhost:9")
    assert result.exit_code == 1 and "morph serve" in sentence(result)
    assert morph("generate", "x", "--url", "http://localhost").exit_code == 2
    assert "metrics page" in sentence(morph("top", "--once", "--metrics-url", "http://localhost:9/metrics"))


def test_the_ports_of_the_server_are_found_in_the_environment(
    morph: Morph, triton: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORPH_GRPC_PORT", str(triton.grpc_port))
    monkeypatch.setenv("MORPH_METRICS_PORT", str(triton.metrics_port))
    assert morph("generate", "x", "--max-tokens", 1).stdout == "w0 \n"
    assert "0 of 8" in morph("top", "--once").stdout
    assert morph("replay", trace(tmp_path)).exit_code == 0
    monkeypatch.setenv("MORPH_URL", "localhost:9")
    assert morph("generate", "x").exit_code == 1, "an address wins over a port"
    monkeypatch.delenv("MORPH_URL")
    monkeypatch.setenv("MORPH_GRPC_PORT", "x")
    assert "MORPH_GRPC_PORT must be a port" in sentence(morph("generate", "x"))


def test_top_prints_one_page(morph: Morph, triton: FakeTriton) -> None:
    triton.service.level = 2
    result = morph("top", "--once", "--metrics-url", triton.metrics_url)
    assert result.exit_code == 0 and "2 of 8" in result.stdout and "\x1b" not in result.stdout


def test_top_into_a_pipe_prints_one_page_after_the_other(triton: FakeTriton) -> None:
    command = [sys.executable, "-c", "from morph_client.cli import main; main()", "top", "--interval", "0.1"]
    environment = {**os.environ, "COLUMNS": "80", "MORPH_METRICS_URL": triton.metrics_url, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        pages = 0
        for line in process.stdout:
            assert "\x1b" not in line
            pages += "Level " in line
            if pages == 3:
                break
        process.terminate()
    assert pages == 3


def test_top_says_when_the_model_is_not_there(morph: Morph, triton: FakeTriton) -> None:
    result = morph("top", "--once", "--metrics-url", triton.metrics_url, "--model", "other")
    assert result.exit_code == 1 and "is the model loaded" in sentence(result)


def test_replay_prints_a_table_and_writes_its_figures(morph: Morph, triton: FakeTriton, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    result = morph("replay", trace(tmp_path), "--url", triton.url, "--metrics-url", triton.metrics_url,
                   "--out", out, "--ttft-slo", 5)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for part in ("3 requests", "TTFT p95", "output tokens per second", "targets missed", "goodput", "100 %"):
        assert part in result.stdout
    figures = json.loads(out.read_text())
    assert figures["trace"] == "trace.csv" and figures["run"]["summary"]["output_tokens"] == 9
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_replay_cuts_and_scales(morph: Morph, triton: FakeTriton, tmp_path: Path) -> None:
    result = morph("replay", trace(tmp_path), "--url", triton.url, "--offset", 0.05, "--window", 10, "--thin", 2,
                   "--speed", 2, "--max-prompt-tokens", 5, "--max-output-tokens", 1,
                   "--tokens-per-word", 1)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "window 10 s, thinned to one in 2 with seed 0, time-compressed × 2, prompts cut at 5 tokens" in text
    assert "1 requests" in text and "5 prompt and 1 output tokens" in text


def test_replay_tells_the_errors_it_met(morph: Morph, triton: FakeTriton, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("refuse " * 9)
    result = morph("replay", trace(tmp_path, "0,1,1\n"), "--url", triton.url, "--text", text, "--tokens-per-word", 0.1)
    assert result.exit_code == 0, "prompts begin with their number, so this text is harmless"
    result = morph("replay", trace(tmp_path), "--url", triton.url, "--text", text)
    assert result.exit_code == 2 and "temperature" in sentence(result)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--speed", "0"], "speed"),
        (["--thin", "0.1"], "thinning"),
        (["--offset", "99"], "the trace runs from 0 to 0.1 s"),
        (["--max-output-tokens", "0"], "at least 1"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--out", "/dev/null/x.json"], "cannot write"),
    ],
)
def test_a_bad_option_is_one_sentence(morph: Morph, tmp_path: Path, arguments: list[str], says: str) -> None:
    result = morph("replay", trace(tmp_path), "--url", "localhost:9", *arguments)
    assert result.exit_code == 2 and says in sentence(result)


def test_a_bad_trace_is_one_sentence(morph: Morph, tmp_path: Path) -> None:
    result = morph("replay", trace(tmp_path, "0,20,3\n-5,1,1\n"))
    assert result.exit_code == 2 and "line 3, column 'arrival_s'" in sentence(result)


def test_serve_becomes_the_launcher_with_its_settings(
    morph: Morph, launcher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(serve.os, "execve", lambda *args: seen.append(args))
    monkeypatch.setenv("MORPH_MODE", "accuracy")
    result = morph("serve", "--model", "/models/x", "--memory-budget-gib", 2.5, "--grpc-port", 9001)
    assert result.exit_code == 0, result.stderr
    ((program, arguments, environment),) = seen
    assert (program, arguments) == (sys.executable, [sys.executable, "-m", "morph_backend.launcher"])
    set_now = {name: value for name, value in environment.items() if name.startswith("MORPH_")}
    assert set_now == {
        "MORPH_MODEL": "/models/x", "MORPH_MODE": "accuracy", "MORPH_MEMORY_BUDGET_GIB": "2.5",
        "MORPH_GRPC_PORT": "9001",
    }  # fmt: skip
    assert dict(os.environ).get("MORPH_MODEL") is None


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_without_the_server_part_the_remedy_is_named(
    morph: Morph, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    result = morph(command)
    assert result.exit_code == 2
    assert "pip install 'morphserve[server,embedded]'" in sentence(result)


def test_the_client_stands_alone() -> None:
    code = (
        "import sys, morph_client, morph_client.cli, morph_client.report.plot; morph_client.cli.build_app();"
        "names = ('torch', 'transformers', 'matplotlib', 'morph_runtime', 'morph_backend');"
        "print([m for m in names if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
