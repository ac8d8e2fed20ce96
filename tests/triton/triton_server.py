"""A real tritonserver for tests, started by the product's launcher."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from morph_client.ports import free_ports

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def fake_repository(folder: Path, *, instances: int = 1, **replacements: str) -> Path:
    """The product's repository with the fake engine; arguments as of `real_repository`."""
    real_repository(folder, instances=instances, **replacements)
    version = folder / "morph" / "1"
    shutil.copy(HERE / "repository" / "model.py", version / "model.py")
    shutil.copy(HERE / "fake_engine.py", version / "fake_engine.py")
    return folder


def real_repository(
    folder: Path, engine: dict[str, Any] | None = None, *, instances: int = 1, **replacements: str
) -> Path:
    """The product's repository; `engine` goes into model.json, `replacements` change config.pbtxt: its fields by name,
    its parameters by name in capitals."""
    shutil.copytree(ROOT / "model_repository", folder)
    path = folder / "morph" / "config.pbtxt"
    config, count = re.subn(r"(instance_group \[ { count): \d+", rf"\g<1>: {instances}", path.read_text())
    assert count == 1
    for name, value in replacements.items():
        pattern, new = rf"^( *){name}: .*$", rf"\g<1>{name}: {value}"
        if name.isupper():
            pattern, new = rf'("{name}" value: {{ string_value: )"[^"]*"', rf'\g<1>"{value}"'
        config, count = re.subn(pattern, new, config, flags=re.MULTILINE)
        assert count == 1, name
    path.write_text(config)
    if engine is not None:
        (folder / "morph" / "1" / "model.json").write_text(json.dumps(engine))
    return folder


class TritonServer:
    """One launcher and its server. `output()` is what the launcher printed."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.http, self.grpc, self.metrics = free_ports(3)
        self.log = folder / "launcher.log"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MORPH_")},
            "PYTHONPATH": f"{ROOT}:{ROOT / 'backend'}",
            "MORPH_HTTP_PORT": str(self.http),
            "MORPH_GRPC_PORT": str(self.grpc),
            "MORPH_METRICS_PORT": str(self.metrics),
            "TMPDIR": str(folder),
            "FAKE_GATE": str(folder / "gate-is-shut"),
            # A repository of the test's own says how many there are; ours would have as many as the machine allows.
            "MORPH_INSTANCES": "" if environment.get("MORPH_MODEL_REPOSITORY") else "1",
            "MORPH_COSTS": "off",  # a start takes long enough as it is, and nothing is left in the user's cache
            **environment,
        }
        self._file = self.log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "morph_backend.launcher"],
            env=self.environment,
            cwd=folder,
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def output(self) -> str:
        return self.log.read_text()

    def wait_ready(self, timeout_s: float = 110.0) -> TritonServer:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the launcher ended: {self.output()}")
            if "ready:" in self.output():
                self._runs = [path.name for path in self.log.parent.glob("morphserve-*")]
                return self
            time.sleep(0.05)
        raise AssertionError(f"not ready in {timeout_s} s: {self.output()}")

    def wait_metrics(self, timeout_s: float = 60.0) -> TritonServer:
        """Wait until the model's own metrics stand on the endpoint, which Triton opens last."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(urllib.error.URLError):
                if "morph_mode" in self.metrics_text():
                    return self
            assert time.monotonic() < deadline, "the model's metrics did not appear"
            time.sleep(0.02)

    def metrics_text(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=60) as answer:
            return answer.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's values over the series that carry the labels."""
        total, found = 0.0, False
        for line in self.metrics_text().splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(f'{k}="{v}"' in head for k, v in labels.items()):
                total, found = total + float(value), True
        if not found:
            raise KeyError(name)
        return total

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """The fake engine holds its requests after their first token: what is to be seen meanwhile needs no haste."""
        gate = Path(self.environment["FAKE_GATE"])
        gate.touch()
        try:
            yield
        finally:
            gate.unlink()

    def alive(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/v2/health/live", timeout=60) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def family(self) -> list[int]:
        """The process ids of tritonserver, the stub and the engine."""
        marker = b"MORPH_RUN_DIR="
        own = str(self.log.parent).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if any(v.startswith(marker) and own in v for v in variables):
                    found.append(int(entry.name))
        return found

    def shared_memory(self) -> list[Path]:
        """What is left in shared memory of this server's."""
        return [path for run in self._runs for path in Path("/dev/shm").glob(f"{run}_*")]

    def stop(self, timeout_s: float = 100.0) -> int:
        """SIGTERM, then wait; the launcher's exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            for pid in self.family():
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._file.close()
