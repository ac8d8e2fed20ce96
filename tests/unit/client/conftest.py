"""The fake Triton, and a way to run the command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))  # tests here share a module, and importlib mode adds no path

from client_fakes import FakeService, FakeTriton

from morph_client.cli import build_app


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    fake = FakeTriton(FakeService())
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def morph(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs ``morph ARGS`` in this process; the result has ``exit_code``, ``stdout`` and ``stderr``."""
    for name in ("MORPH_URL", "MORPH_METRICS_URL", "MORPH_GRPC_PORT", "MORPH_METRICS_PORT", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *args: CliRunner().invoke(build_app(), [str(arg) for arg in args])


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a ``morph_backend.launcher`` in front of any other: the fake Triton of ``client_fakes``."""
    package = tmp_path / "packages" / "morph_backend"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    here = str(Path(__file__).parent)
    (package / "launcher.py").write_text(
        f"import sys; sys.path.insert(0, {here!r})\nimport client_fakes; client_fakes.main()\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return package
