"""The set-up's own tools: what they say to whom, and which Python they choose."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_host = load("check_host")
lock_constraints = load("lock_constraints")
audit = load("audit")


class Facts:
    """A machine on which all is well, but for what a test changes."""

    def __init__(self, **changes: Any) -> None:
        self.python = (3, 11)
        self.implementation = "CPython"
        self.system, self.machine, self.is_64bit = "Linux", "x86_64", True
        self.glibc: tuple[int, int] | None = (2, 36)
        self.has_venv = True
        self.libpython: str | None = "/usr/lib/libpython3.11.so.1.0"
        self.has_apt = True
        self.is_distro_python = True
        vars(self).update(changes)


@pytest.mark.parametrize("python", [(3, 10), (3, 11), (3, 12)])
def test_a_supported_python_on_a_fit_machine_passes(python: tuple[int, int]) -> None:
    facts = Facts(python=python)
    assert check_host.check_version(facts) is None
    assert check_host.check_host(facts) is None


def test_the_python_of_this_test_run_passes_the_checks_as_it_is() -> None:
    facts = check_host.HostFacts()
    assert check_host.check_version(facts) is None
    assert check_host.check_host(facts) is None


def test_every_field_that_the_checks_read_is_a_fact_of_the_host() -> None:
    assert set(vars(Facts())) == set(vars(check_host.HostFacts()))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"python": (3, 13)}, ["3.13", "NumPy < 2", "make PYTHON=python3.11"]),
        ({"python": (3, 14)}, ["3.14", "make PYTHON=python3.11"]),
        ({"python": (3, 9)}, ["3.9", "too old", "make PYTHON=python3.11"]),
        ({"implementation": "PyPy"}, ["PyPy", "CPython"]),
    ],
)
def test_an_unsupported_python_gets_one_sentence_with_the_remedy(changes: dict[str, Any], words: list[str]) -> None:
    sentence = check_host.check_version(Facts(**changes))
    assert all(word in sentence for word in words) and "\n" not in sentence


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"system": "Darwin", "machine": "arm64"}, ["Linux", "x86-64", "Darwin"]),
        ({"machine": "aarch64"}, ["x86-64", "aarch64"]),
        ({"is_64bit": False}, ["64-bit"]),
        ({"glibc": (2, 31)}, ["glibc 2.35", "2.31"]),
        ({"glibc": None}, ["glibc 2.35", "another C library"]),
        ({"has_venv": False}, ["apt-get install python3.11-venv"]),
        ({"has_venv": False, "has_apt": False}, ["python3.11", "venv"]),
        ({"libpython": None}, ["apt-get install libpython3.11"]),
        ({"libpython": None, "is_distro_python": False}, ["libpython3.11.so.1.0", "--enable-shared"]),
    ],
)
def test_what_the_host_lacks_is_said_in_one_sentence_with_the_remedy(changes: dict[str, Any], words: list[str]) -> None:
    sentence = check_host.check_host(Facts(**changes))
    assert all(word in sentence for word in words) and "\n" not in sentence


@pytest.mark.parametrize("glibc", [(2, 35), (2, 100), (3, 0)])
def test_glibc_versions_compare_as_numbers(glibc: tuple[int, int]) -> None:
    assert check_host.check_host(Facts(glibc=glibc)) is None


def interpreter(folder: Path, name: str, script: str) -> Path:
    """Put a stand-in for an interpreter into a folder of PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# Runs `-c` like a Python; when asked to run check_host.py it answers with a sentence and a status.
STAND_IN = """case "$1" in -c) exec "{real}" "$@";; esac
echo "{sentence}" >&2
exit {status}
"""


def pick(path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path + ":/usr/bin:/bin", **variables}
    if "PYTHON" not in variables:  # hide the system's own Pythons
        environment["PATH"] = path
    return subprocess.run(
        ["/bin/bash", str(TOOLS / "pick_python.sh")], env=environment, capture_output=True, text=True, timeout=60
    )


def stand_in(folder: Path, name: str, status: int, sentence: str = "fit") -> Path:
    return interpreter(folder, name, STAND_IN.format(real=sys.executable, sentence=sentence, status=status))


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A PATH of its own, with what the script itself needs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "dirname").symlink_to("/usr/bin/dirname")
    return folder


def test_a_shim_that_fails_is_passed_over(bin_folder: Path, tmp_path: Path) -> None:
    interpreter(bin_folder, "python3.11", "echo 'command not found' >&2; exit 127\n")
    stand_in(tmp_path / "later", "python3.11", 0)
    done = pick(f"{bin_folder}:{tmp_path / 'later'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert os.path.samefile(done.stdout.strip(), sys.executable)


def test_the_next_name_is_tried_when_one_is_unfit(bin_folder: Path) -> None:
    stand_in(bin_folder, "python3.11", 1, "it lacks venv")
    stand_in(bin_folder, "python3.12", 0)
    assert pick(str(bin_folder)).returncode == 0


def test_what_a_supported_python_lacks_is_said_before_another_versions_fault(bin_folder: Path) -> None:
    stand_in(bin_folder, "python3.12", 1, "python3.12 lacks the venv module")
    stand_in(bin_folder, "python3", 2, "Python 3.13 is not supported")
    done = pick(str(bin_folder))
    assert (done.returncode, done.stderr) == (1, "python3.12 lacks the venv module\n")


def test_the_only_python_being_too_new_is_said(bin_folder: Path) -> None:
    stand_in(bin_folder, "python3", 2, "Python 3.13 is not supported")
    assert pick(str(bin_folder)).stderr == "Python 3.13 is not supported\n"


def test_no_python_at_all_is_one_sentence(bin_folder: Path) -> None:
    done = pick(str(bin_folder))
    assert done.returncode == 1
    assert done.stderr.startswith("no Python was found") and done.stderr.count("\n") == 1


def test_the_named_python_alone_is_judged(bin_folder: Path) -> None:
    stand_in(bin_folder, "python3.11", 0)
    done = pick(str(bin_folder), PYTHON="/nowhere/python3.11")
    assert done.returncode == 1
    assert done.stderr == "PYTHON=/nowhere/python3.11 does not run: name a Python 3.10, 3.11 or 3.12\n"


def test_pins_that_differ_between_pythons_get_a_marker() -> None:
    resolved = {
        "3.10": ["both==1", "last==1", "old==1"],
        "3.11": ["both==1", "last==2"],
        "3.12": ["both==1", "last==2"],
    }
    assert lock_constraints.merge(resolved) == [
        "both==1",
        'last==1 ; python_version == "3.10"',
        'last==2 ; python_version >= "3.11"',
        'old==1 ; python_version == "3.10"',
    ]


KNOWN = {"name": "a", "version": "1", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "Dependency not found"}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}, {"id": "X-2", "fix_versions": []}]}


@pytest.mark.parametrize(
    "packages, status, said",
    [
        ([KNOWN, KNOWN], 0, "no vulnerability in 2 packages."),
        ([KNOWN, UNKNOWN], 0, "no vulnerability in 1 packages; it does not know 1 others."),
        ([KNOWN, BAD], 1, "1 of 2 packages have known vulnerabilities:\n  c 2: X-1, X-2 (mended in 3)"),
        ([UNKNOWN, UNKNOWN], 2, "cannot be reached from here: it knows none of 2 packages."),
        ([], 2, "cannot be reached"),
    ],
)
def test_an_audit_that_nobody_answered_is_not_a_good_one(packages: list[Any], status: int, said: str) -> None:
    found = audit.verdict(packages)
    assert found[0] == status and said in found[1]
