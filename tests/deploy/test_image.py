"""deploy/Dockerfile, as far as it can be told without building it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from triton_server import ROOT

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def environment() -> dict[str, str]:
    lines = re.findall(r"^ENV (.*)$", DOCKERFILE, re.M)
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


def test_what_is_written_at_run_time_goes_where_user_1000_may_write_and_load_code_from() -> None:
    for name in ("HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        assert Path(environment()[name]).is_relative_to("/tmp"), name
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name in ("triton", "triton-cpu"):
        (mount,) = services[name]["tmpfs"]
        assert mount.startswith("/tmp:") and "exec" in mount.partition(":")[2].split(",")


@pytest.mark.parametrize(
    "extras, there, asked",
    [
        ("server,openai-server", False, False),
        ("server,cuda,openai-server", True, False),
        ("server,cuda,openai-server", False, True),
        ("cuda", False, True),
    ],
)
def test_a_compiler_is_installed_where_the_gpus_kernels_need_one(
    tmp_path: Path, extras: str, there: bool, asked: bool
) -> None:
    """The build's own script, with an apt-get that only notes what it was asked for, and a gcc that obeys."""
    (script,) = (run for run in re.findall(r"^RUN ((?:.*\\\n)*.*)$", DOCKERFILE, re.M) if "Python.h" in run)
    done = tmp_path / "installed"
    programs = {
        "gcc": f'cat >{tmp_path}/source; [ -e "{done}" ]',
        "apt-get": f'echo "$@" >>{tmp_path}/asked; case "$1" in install) touch "{done}" ;; esac',
        "rm": "exit 0",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if there:
        done.touch()
    settings = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MORPH_EXTRAS": extras}
    result = subprocess.run(["sh", "-c", script], env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert ("install -y --no-install-recommends gcc libc6-dev python3-dev" in said) == asked == bool(said)
    if "cuda" in extras:
        assert (tmp_path / "source").read_text() == "#include <Python.h>\n"
