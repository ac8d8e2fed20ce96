"""The launcher refuses with one sentence what cannot work, before it starts Triton."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from triton_server import ROOT, TritonServer, fake_repository, free_ports


def launch(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("MORPH_")},
        "PYTHONPATH": f"{ROOT}:{ROOT / 'backend'}",
        "TMPDIR": str(tmp_path),
        **environment,
    }
    command = [sys.executable, "-m", "morph_backend.launcher", *arguments]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)


def ports() -> dict[str, str]:
    names = ("MORPH_HTTP_PORT", "MORPH_GRPC_PORT", "MORPH_METRICS_PORT")
    return {name: str(port) for name, port in zip(names, free_ports(3), strict=True)}


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"MORPH_MODEL": "/no/such/folder"}, "The model folder '/no/such/folder' does not exist"),
        ({"MORPH_HTTP_PORT": "x"}, "MORPH_HTTP_PORT must be a port between 1 and 65535, but is 'x'."),
        ({"MORPH_GRPC_PORT": "70000"}, "MORPH_GRPC_PORT must be a port"),
        ({"MORPH_HTTP_PORT": "8001"}, "must be three different ports"),
        (
            {"MORPH_MODE": "fast"},
            "morph.mode (MORPH_MODE) must be one of accuracy, balanced, performance, off, but is 'fast'.",
        ),
        ({"MORPH_MAX_NUM_SEQS": "many"}, "MORPH_MAX_NUM_SEQS must be a whole number, but is 'many'."),
        ({"MORPH_LOG_LEVEL": "loud"}, "MORPH_LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
        ({"MORPH_DRAIN_S": "-1"}, "MORPH_DRAIN_S must be between 0 and 3600 seconds"),
        ({"MORPH_HOST": "203.0.113.1"}, "MORPH_HOST '203.0.113.1' is not an address of this machine."),
        ({"MORPH_MEMORY_BUDGET_GB": "4"}, "MORPH_MEMORY_BUDGET_GB is no setting: MORPH_MEMORY_BUDGET_GIB is meant"),
        ({"MORPH_MODEL_REPOSITORY": "/no/such"}, "The model repository '/no/such' has no 'morph/config.pbtxt'."),
    ],
)
def test_bad_settings_are_one_sentence(
    tmp_path: Path, tiny_model: Path, environment: dict[str, str], said: str
) -> None:
    done = launch(tmp_path, **{"MORPH_MODEL": str(tiny_model), **environment})
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_check_alone_starts_nothing(tmp_path: Path, tiny_model: Path) -> None:
    demo = str(ROOT / "models" / "morph-demo")
    done = launch(tmp_path, "--check", MORPH_MODEL=demo, MORPH_MODE="off", MORPH_LOG_LEVEL="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{demo} can be served, mode off: 12 layers, context 2,048 tokens; ")
    done = launch(tmp_path, "--check", MORPH_MODEL=demo, MORPH_MEMORY_BUDGET_GIB="0.01")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("memory.budget_gib (MORPH_MEMORY_BUDGET_GIB) is 0.01, but this model needs at least")
    done = launch(tmp_path, "--check", MORPH_MODEL=str(tiny_model), MORPH_TRITON_DIR=str(tmp_path))
    assert done.returncode == 2 and "is no Triton with a Python backend" in done.stderr


def test_a_model_folder_without_a_tokenizer(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    done = launch(tmp_path, "--model", str(model))
    assert done.returncode == 2 and "has no tokenizer.json" in done.stderr


def test_a_port_in_use(tmp_path: Path, tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        done = launch(tmp_path, "--model", str(tiny_model), **{**ports(), "MORPH_GRPC_PORT": str(port)})
    assert done.returncode == 2
    assert done.stderr == f"Port {port} is in use: set MORPH_GRPC_PORT to a free one.\n"


def test_bad_engine_settings_in_the_repository(tmp_path: Path, tiny_model: Path) -> None:
    repository = fake_repository(tmp_path / "repository")
    (repository / "morph" / "1" / "model.json").write_text(json.dumps({"scheduler": {"lime": 3}}))
    done = launch(tmp_path, "--model-repository", str(repository), MORPH_MODEL=str(tiny_model))
    assert done.returncode == 2 and "Unknown setting 'scheduler.lime'" in done.stderr


@pytest.mark.triton
def test_the_models_own_sentence_when_it_cannot_load(tmp_path: Path, tiny_model: Path) -> None:
    repository = fake_repository(tmp_path / "repository")
    sentence = "The budget of 0.1 GiB does not hold the weights: set MORPH_MEMORY_BUDGET_GIB to at least 1."
    environment = {"MORPH_MODEL": str(tiny_model), "MORPH_MODEL_REPOSITORY": str(repository)}
    done = launch(tmp_path, **environment, **ports(), FAKE_START_ERROR=sentence)
    assert done.returncode == 1
    assert done.stderr == sentence + "\n"
    assert not list(tmp_path.glob("morphserve-*"))


@pytest.mark.triton
def test_a_defect_of_the_model_is_shown_with_its_traceback(tmp_path: Path, tiny_model: Path) -> None:
    repository = fake_repository(tmp_path / "repository")
    (repository / "morph" / "1" / "model.py").write_text("import no_such_module_at_all\n")
    environment = {"MORPH_MODEL": str(tiny_model), "MORPH_MODEL_REPOSITORY": str(repository)}
    done = launch(tmp_path, **environment, **ports())
    assert done.returncode == 1
    assert "no_such_module_at_all" in done.stderr and "Triton could not start (exit status 1)." in done.stderr


@pytest.mark.triton
def test_what_it_prints_is_short(server: TritonServer) -> None:
    lines = [line for line in server.output().splitlines() if line]
    assert lines[0].startswith("loading ") and lines[1].startswith(f"ready: http://127.0.0.1:{server.http}")


@pytest.mark.triton
def test_it_listens_on_this_machine_alone(server: TritonServer) -> None:
    tables = [Path("/proc/net/tcp").read_text(), Path("/proc/net/tcp6").read_text()]
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    listening = {row[1] for row in rows if row[3] == "0A"}
    for port in (server.http, server.grpc, server.metrics):
        addresses = {address.rpartition(":")[0] for address in listening if address.endswith(f":{port:04X}")}
        assert addresses and addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}


def too_new_python() -> str | None:
    """A Python 3.13 that really runs, if this machine has one."""
    found = shutil.which("python3.13")
    if found is None or subprocess.run([found, "-c", ""], capture_output=True, timeout=200).returncode:
        return None
    return found


def test_a_python_that_is_too_new_is_one_sentence(tmp_path: Path) -> None:
    python = too_new_python()
    if python is None:
        pytest.skip("there is no Python 3.13 here")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'backend'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-m", "morph_backend.launcher"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.startswith("Python 3.13 cannot run the embedded Triton") and done.stderr.count("\n") == 1
