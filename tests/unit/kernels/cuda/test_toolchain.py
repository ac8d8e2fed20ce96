"""What a GPU's kernels need of the machine is missed with a sentence, before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.cuda.toolchain import check_toolchain


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home" / "kernels"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.delenv("CC", raising=False)
    return folder


def test_a_folder_that_cannot_be_made_is_named(cache: Path) -> None:
    cache.parent.write_text("a file, where a folder should be")
    with pytest.raises(ConfigError, match=r"'.*/home/kernels', cannot be written to .*: set TRITON_CACHE_DIR"):
        check_toolchain()


def test_a_machine_without_a_compiler_is_told_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"no C compiler, .* install gcc, or set CC"):
        check_toolchain()


def test_missing_headers_of_python_are_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("sysconfig.get_paths", lambda **_: {"include": "/nowhere"})
    with pytest.raises(ConfigError, match=r"'/nowhere/Python.h' is missing, .* install python3-dev"):
        check_toolchain()


def test_kernels_that_are_there_need_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "a-kernel").mkdir(parents=True)
    monkeypatch.setenv("PATH", "")
    check_toolchain()
