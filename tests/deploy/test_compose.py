"""`docker compose up` for real, on stand-in images: tests/deploy/standin.sh makes them; `make test-deploy`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from triton_server import ROOT, free_ports
from wire_client import until

IMAGES = ("nvcr.io/nvidia/tritonserver:standin", "prom/prometheus:standin")
PORTS = ("MORPH_HTTP_PORT", "MORPH_GRPC_PORT", "MORPH_METRICS_PORT", "MORPH_OPENAI_PORT", "PROMETHEUS_PORT")


def why_not() -> str:
    """Why no stack can be started here; empty if one can."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0:
        return "docker has no compose plugin (version 2)"
    if subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        return "no Docker engine answers"
    for image in IMAGES:
        if subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode != 0:
            return f"there is no image {image}: tests/deploy/standin.sh makes it"
    return ""


REASON = why_not()
pytestmark = [pytest.mark.docker, pytest.mark.timeout(900), pytest.mark.skipif(bool(REASON), reason=REASON)]


class Stack:
    """One project of docker compose."""

    def __init__(self, **environment: str) -> None:
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MORPH_")},
            **{name: str(port) for name, port in self.ports.items()},
            "TRITON_TAG": "standin",
            "PROMETHEUS_TAG": "standin",
            "PIP_ARGS": "--no-index --find-links=/wheels",
            "MORPH_EXTRAS": "server,openai-server",
            "MORPH_IMAGE_TAG": "test",
            "MORPH_DRAIN_S": "5",
            **environment,
        }

    def compose(self, *arguments: str, profile: str = "cpu") -> subprocess.CompletedProcess[str]:
        files = ["-f", "docker-compose.yml", "-f", "tests/deploy/override.yml"]
        command = ["docker", "compose", "-p", "morphserve-test", *files, "--profile", profile, *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=800)

    def get(self, port: str, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports[port]}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    def query(self, expression: str) -> list[Any]:
        answer = json.loads(self.get("PROMETHEUS_PORT", f"/api/v1/query?query={urllib.parse.quote(expression)}"))
        return list(answer["data"]["result"])


@pytest.fixture(scope="module")
def built() -> None:
    done = Stack().compose("build")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def stack(built: None) -> Iterator[Stack]:
    stack = Stack(MORPH_MODE="performance")
    began = time.monotonic()
    try:
        done = stack.compose("up", "--detach", "--wait", "--wait-timeout", "300")
        assert done.returncode == 0, done.stderr + stack.compose("logs").stdout
        print(f"healthy after {time.monotonic() - began:.1f} s")  # under 60 s on two idle cores; docs/deploy.md
        yield stack
    finally:
        print(stack.compose("logs", "--no-color", "--tail", "20").stdout)
        stack.compose("down", "--volumes", "--timeout", "20")


def test_a_stream_is_served_by_triton_and_by_the_openai_endpoint(stack: Stack) -> None:
    body = {"text_input": "It was a dark night", "stream": True, "max_tokens": 12}
    events = stack.get("MORPH_HTTP_PORT", "/v2/models/morph/generate_stream", body)
    assert events.count("data: ") > 3 and "error" not in events
    asked = {"model": "morph", "prompt": "It was a dark night", "max_tokens": 12, "stream": True}
    events = stack.get("MORPH_OPENAI_PORT", "/v1/completions", asked)
    assert events.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in events


def test_the_settings_reach_the_model_and_prometheus_scrapes_it(stack: Stack) -> None:
    until(lambda: stack.query('morph_mode{mode="performance"} == 1'), 20.0, "a scrape")
    assert stack.query('up{job="morphserve"} == 1')
    rules = json.loads(stack.get("PROMETHEUS_PORT", "/api/v1/rules"))["data"]["groups"][0]["rules"]
    assert all(rule["health"] in ("ok", "unknown") for rule in rules) and len(rules) > 5


def test_the_containers_are_locked_down(stack: Stack) -> None:
    script = "id -u; touch /x 2>&1; cat /proc/self/status | grep CapEff; df -m /dev/shm | tail -1"
    done = stack.compose("exec", "-T", "triton-cpu", "sh", "-c", script)
    user, touched, capabilities, shm = done.stdout.splitlines()
    assert user == "1000" and "Read-only file system" in touched
    assert capabilities.split()[1].strip("0") == "" and int(shm.split()[1]) == 1024


def test_a_hung_engine_makes_the_container_unhealthy(stack: Stack) -> None:
    script = (
        "import os, pathlib, signal, sys\n"
        "for p in pathlib.Path('/proc').iterdir():\n"
        "    name = (p / 'cmdline').read_bytes() if p.name.isdigit() and int(p.name) != os.getpid() else b''\n"
        "    if b'morph_runtime.engine.process' in name:\n"
        "        os.kill(int(p.name), getattr(signal, sys.argv[1]))\n"
    )

    def state() -> str:
        return stack.compose("ps", "--format", "{{.Health}}", "triton-cpu").stdout.strip()

    assert state() == "healthy"
    stack.compose("exec", "-T", "triton-cpu", "python3", "-c", script, "SIGSTOP")
    try:
        until(lambda: state() == "unhealthy", 60.0, "an unhealthy container")
    finally:
        stack.compose("exec", "-T", "triton-cpu", "python3", "-c", script, "SIGCONT")
    until(lambda: state() == "healthy", 30.0, "a healthy container")


@pytest.mark.parametrize(
    "environment, profile, said",
    [
        ({"MORPH_MODE": "fast"}, "cpu", "morph.mode (MORPH_MODE) must be one of accuracy, balanced, performance, off"),
        ({"MORPH_MEMORY_BUDGET_GIB": "0.01"}, "cpu", "but this model needs at least"),
        ({"MORPH_MAX_MODEL_LEN": "99999"}, "cpu", "but the model's context is 2048 tokens"),
        ({"MORPH_MEMORY_BUDGET_GIB": "lots"}, "cpu", "MORPH_MEMORY_BUDGET_GIB must be a number, but is 'lots'."),
        ({"MORPH_MODEL": str(ROOT / "docs")}, "cpu", "has no config.json"),
        ({"MORPH_MODEL": "/no/such/folder"}, "cpu", "bind source path does not exist: /no/such/folder"),
        ({}, "gpu", "/set-MORPH_MODEL-to-the-folder-of-a-model"),
    ],
)
def test_wrong_settings_fail_at_once_with_one_sentence(
    built: None, environment: dict[str, str], profile: str, said: str
) -> None:
    stack = Stack(**environment)
    service = "check" if profile == "gpu" else "check-cpu"
    began = time.monotonic()
    try:
        done = stack.compose("up", "--no-build", "--exit-code-from", service, service, profile=profile)
        assert done.returncode != 0 and said in done.stdout + done.stderr
        assert time.monotonic() - began < 60
    finally:
        stack.compose("down", "--volumes", profile=profile)


def test_an_image_without_a_fitting_python_fails_the_build_with_one_sentence(tmp_path: Path) -> None:
    text = "FROM nvcr.io/nvidia/tritonserver:standin\nRUN printf '#!/bin/sh\\nexec /usr/bin/python3 -c \"import sys; "
    text += 'sys.version_info = (3, 13); exec(sys.argv[1])" "$2"\\n\' > /usr/local/bin/python3'
    text += " && chmod +x /usr/local/bin/python3\n"
    (tmp_path / "Dockerfile").write_text(text)
    subprocess.run(
        ["docker", "build", "-q", "--network=host", "-t", "nvcr.io/nvidia/tritonserver:odd", str(tmp_path)], check=True
    )
    done = Stack(TRITON_TAG="odd", MORPH_IMAGE_TAG="odd").compose("build", "triton-cpu")
    assert done.returncode != 0
    assert "This Triton image has Python 3.13, but 3.10, 3.11 or 3.12 is needed" in done.stdout + done.stderr
