"""`morph quantize` without AutoAWQ: what it refuses, the environment that it keeps, what it hands to the worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morph_client.awq import environment, worker
from morph_client.errors import BadInput, MorphError

Morph = Callable[..., Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a checkpoint."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "text.txt").write_text("some words")
    return folder


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """An environment that counts as complete; its interpreter writes its arguments down and ends with 0."""
    folder = tmp_path / "env"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit $(cat {tmp_path}/status)\n'
    )
    (folder / "bin" / "python").chmod(0o755)
    (folder / environment.STAMP).write_text(json.dumps({"digest": environment.digest()}))
    (tmp_path / "status").write_text("0")
    return folder


def run(morph: Morph, tmp_path: Path, model: Path, *more: Any) -> Any:
    return morph("quantize", model, "--out", tmp_path / "out", "--text", tmp_path / "text.txt", *more)


def test_the_worker_gets_absolute_paths_and_the_sizes(morph: Morph, tmp_path: Path, model: Path, ready: Path) -> None:
    result = run(morph, tmp_path, model, "--env", ready, "--samples", 7, "--length", 64)
    assert result.exit_code == 0, result.stderr
    assert f"MORPH_MODEL={model} MORPH_AWQ={tmp_path / 'out'}" in result.stdout
    words = (tmp_path / "arguments").read_text().split()
    assert words[0] == "-I" and words[1].endswith("worker.py")
    assert words[2:] == [
        str(model),
        str(tmp_path / "out"),
        str(tmp_path / "text.txt"),
        "--samples",
        "7",
        "--length",
        "64",
    ]


@pytest.mark.parametrize("status,exit_code,said", [(2, 2, "for the reason above"), (1, 1, "AutoAWQ failed")])
def test_a_worker_that_fails_ends_the_command(
    morph: Morph, tmp_path: Path, model: Path, ready: Path, status: int, exit_code: int, said: str
) -> None:
    (tmp_path / "status").write_text(str(status))
    result = run(morph, tmp_path, model, "--env", ready)
    assert result.exit_code == exit_code and said in result.stderr


BAD: list[tuple[Callable[[Path, Path], Any], str]] = [
    (lambda model, _: (model / "config.json").unlink(), "must be the folder of a Hugging Face checkpoint"),
    (
        lambda model, _: (model / "config.json").write_text('{"architectures": ["Bert"]}'),
        "has the architecture ['Bert']",
    ),
    (
        lambda model, _: (model / "config.json").write_text(
            '{"architectures": ["LlamaForCausalLM"], "quantization_config": {}}'
        ),
        "is quantized already",
    ),
    (lambda model, _: (model / "tokenizer.json").unlink(), "has no tokenizer.json"),
    (lambda _, tmp: (tmp / "text.txt").unlink(), "--text must name a file"),
    (lambda _, tmp: ((tmp / "out").mkdir(), (tmp / "out" / "x").touch()), "is not an empty folder"),
]


@pytest.mark.parametrize("spoil,said", BAD)
def test_what_cannot_work_is_refused_before_anything_is_installed(
    morph: Morph, tmp_path: Path, model: Path, spoil: Callable[[Path, Path], Any], said: str
) -> None:
    spoil(model, tmp_path)
    result = run(morph, tmp_path, model, "--env", tmp_path / "env")
    assert result.exit_code == 2 and said in result.stderr and not (tmp_path / "env").exists()


def test_a_folder_that_this_command_has_not_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    (tmp_path / "pyvenv.cfg").touch()
    with pytest.raises(BadInput, match="is not empty and was not made by this command"):
        environment.ensure(tmp_path, print)
    assert (tmp_path / "precious").exists()


def test_an_environment_of_other_versions_is_not_taken(ready: Path) -> None:
    assert environment.is_ready(ready)
    (ready / environment.STAMP).write_text('{"digest": "other"}')
    assert not environment.is_ready(ready)


def test_an_installation_that_fails_names_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command[:1])

    monkeypatch.setattr(environment.venv, "create", lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(environment.subprocess, "run", fail)
    said: list[str] = []
    with pytest.raises(MorphError, match=r"could not be made; see .*pip\.log"):
        environment.ensure(tmp_path / "env", said.append)
    assert "making an environment for AutoAWQ" in said[0] and not environment.is_ready(tmp_path / "env")


def test_the_folder_comes_from_the_environment_or_the_cache() -> None:
    assert environment.default_folder({"MORPH_AWQ_ENV": "/a/b"}) == Path("/a/b")
    assert environment.default_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/morphserve/awq-env")


def test_an_unsupported_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(BadInput, match=r"needs Python 3\.10, 3\.11 or 3\.12"):
        environment.check_interpreter()


def test_a_config_of_transformers_5_is_put_in_the_words_of_4() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    older = worker.older_config({"rope_parameters": rope, "dtype": "bfloat16", "hidden_size": 8})
    assert older == {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        "torch_dtype": "bfloat16",
        "hidden_size": 8,
    }
    plain = worker.older_config({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    assert plain == {"rope_theta": 1e4, "rope_scaling": None}
    assert worker.older_config({"rope_theta": 2.0, "torch_dtype": "float16"})["rope_theta"] == 2.0


def test_calibration_takes_pieces_from_all_over_the_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {str(number): number for number in range(100)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(number) for number in range(100)))
    assert worker.calibration_pieces(tmp_path, text, 2, 10) == [list(range(10)), list(range(50, 60))]
    assert len(worker.calibration_pieces(tmp_path, text, 50, 30)) == 3
    with pytest.raises(ValueError, match="has 100 tokens, fewer than one piece of 101"):
        worker.calibration_pieces(tmp_path, text, 1, 101)
