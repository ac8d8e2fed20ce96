from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from morph_backend.launcher.ensembles import ensembles_over, warning
from morph_backend.launcher.launch_settings import check_names, default_instances, launch_settings
from morph_backend.launcher.preflight import check_port
from morph_backend.launcher.processes import end_processes, processes_of
from morph_backend.launcher.run_folder import RunFolder, sweep_stale
from morph_backend.launcher.server_log import LogFilter, Severity, classify
from morph_backend.launcher.triton_files import check_python, find_installed, find_triton
from morph_runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
NAME = re.compile(r"\bMORPH_[A-Z_]*[A-Z]\b")


def test_the_command_line_wins_over_the_environment() -> None:
    env = {"MORPH_HTTP_PORT": "9000", "MORPH_MODEL": "a", "MORPH_LOG_VERBOSE": "0"}
    settings = launch_settings(["--http-port", "9100", "--model", "b", "--mode", "off"], env)
    assert settings.http_port == 9100 and settings.grpc_port == 8001 and settings.host == "127.0.0.1"
    assert settings.environment["MORPH_MODEL"] == "b" and settings.environment["MORPH_MODE"] == "off"
    assert not settings.verbose and launch_settings(["--verbose"], {}).verbose
    assert launch_settings([], {"MORPH_LOG_VERBOSE": "1"}).verbose


def test_an_address_for_all_is_probed_on_this_machine() -> None:
    assert launch_settings(["--host", "0.0.0.0"], {}).probe_host == "127.0.0.1"
    assert launch_settings(["--host", "10.1.2.3"], {}).probe_host == "10.1.2.3"


def test_a_slip_in_a_variables_name_is_told() -> None:
    with pytest.raises(ConfigError, match="MORPH_KV_TOKEN is no setting: MORPH_KV_TOKENS is meant"):
        launch_settings([], {"MORPH_KV_TOKEN": "4096"})
    launch_settings([], {"MORPH_STUDIO_LICENCE": "another product's"})


def test_no_variable_of_this_repository_is_taken_for_a_slip() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    files = [ROOT / name for name in listed if name.endswith((".py", ".yml", ".yaml", ".sh", "Dockerfile", "Makefile"))]
    names = {name for path in files if "tests" not in path.parts for name in NAME.findall(path.read_text())}
    assert not files or len(names) > 30
    check_names(dict.fromkeys(names, "x"))


@pytest.mark.parametrize("value", ["0", "65536", "-1", "x", "１"])
def test_bad_ports(value: str) -> None:
    with pytest.raises(ConfigError, match="MORPH_GRPC_PORT must be a port between 1 and 65535"):
        launch_settings([], {"MORPH_GRPC_PORT": value})


def test_bad_drain_and_equal_ports() -> None:
    with pytest.raises(ConfigError, match="MORPH_DRAIN_S"):
        launch_settings([], {"MORPH_DRAIN_S": "nan"})
    with pytest.raises(ConfigError, match="three different"):
        launch_settings(["--http-port", "8002"], {})


@pytest.mark.parametrize("value", ["0", "-1", "x", "33", "２"])
def test_bad_numbers_of_instances(value: str) -> None:
    with pytest.raises(ConfigError, match="MORPH_INSTANCES must be a number between 1 and 32"):
        launch_settings([], {"MORPH_INSTANCES": value})


def repository(folder: Path, instances: str = "instance_group [ { count: 2 kind: KIND_MODEL } ]") -> Path:
    for model in ("morph", "another"):
        (folder / model / "1").mkdir(parents=True)
        (folder / model / "config.pbtxt").write_text(f'name: "{model}"\n{instances}\n')
        (folder / model / "1" / "model.json").write_text("{}")
    return folder


@pytest.fixture
def run() -> Iterator[RunFolder]:
    run = RunFolder()
    yield run
    run.remove()


def test_as_many_instances_as_are_asked_for_and_nothing_else_is_changed(run: RunFolder, tmp_path: Path) -> None:
    given = repository(tmp_path)
    made = run.repository(launch_settings(["--model-repository", str(given)], {"MORPH_INSTANCES": "4"}))
    assert made != given
    assert (made / "morph" / "config.pbtxt").read_text() == (
        'name: "morph"\ninstance_group [ { count: 4 kind: KIND_MODEL } ]\n'
    )
    assert (made / "morph" / "1" / "model.json").read_text() == "{}"
    assert (made / "another" / "config.pbtxt").read_text() == (given / "another" / "config.pbtxt").read_text()
    assert "count: 2" in (given / "morph" / "config.pbtxt").read_text()


@pytest.mark.parametrize("number", ["", "2"])
def test_a_repository_that_says_how_many_instances_there_are_is_served_as_it_is(
    run: RunFolder, tmp_path: Path, number: str
) -> None:
    given = repository(tmp_path)
    assert run.repository(launch_settings(["--model-repository", str(given)], {"MORPH_INSTANCES": number})) == given


def test_a_repository_that_says_it_in_another_way_is_not_changed_behind_its_owners_back(
    run: RunFolder, tmp_path: Path
) -> None:
    given = repository(tmp_path, "")
    assert run.repository(launch_settings(["--model-repository", str(given)], {})) == given
    with pytest.raises(ConfigError, match=r"MORPH_INSTANCES: '.*config\.pbtxt' has no line `instance_group"):
        run.repository(launch_settings(["--model-repository", str(given)], {"MORPH_INSTANCES": "3"}))


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(count))


def test_our_own_repository_has_as_many_instances_as_the_processors_beside_a_gpu_allow(
    run: RunFolder, processors: Callable[[int], None]
) -> None:
    for count, instances in ((1, 1), (9, 1), (16, 3), (32, 6), (128, 8)):
        processors(count)
        assert default_instances() == instances
    made = run.repository(launch_settings([], {"MORPH_DEVICE": "cuda"}))
    assert "count: 8 kind" in (made / "morph" / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("line", "model", "environment"),
    [
        ("instance_group [ { count: 2 kind: KIND_MODEL } ]", "{}", {"MORPH_DEVICE": "cuda"}),
        ("# instance_group [ { count: 1 } ]", "{}", {"MORPH_DEVICE": "cuda"}),
        ("instance_group [ { count: 1 } ]", "{}", {}),
        ("instance_group [ { count: 1 } ]", "no JSON", {}),
        ("instance_group [ { count: 1 } ]", '{"device": "cuda"}', {"MORPH_DEVICE": "cpu"}),
    ],
    ids=["another number", "another form", "a CPU", "a broken file", "a CPU after all"],
)
def test_our_own_repository_is_served_as_it_is(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: Callable[[int], None],
    line: str, model: str, environment: dict[str, str],
) -> None:  # fmt: skip
    processors(32)
    given = repository(tmp_path, line)
    (given / "morph" / "1" / "model.json").write_text(model)
    monkeypatch.setattr(RunFolder, "_repository", lambda _run, _settings: given)
    assert run.repository(launch_settings([], environment)) == given


def test_python_and_numpy() -> None:
    check_python((3, 11), "1.26.4")
    with pytest.raises(ConfigError, match=r"Python 3\.13 cannot run the embedded Triton"):
        check_python((3, 13), "1.26.4")
    with pytest.raises(ConfigError, match=r"NumPy 2\.1\.0 crashes .* pip install 'numpy<2'"):
        check_python((3, 12), "2.1.0")


def test_triton_is_found_without_importing_it() -> None:
    code = (
        "import sys; from morph_backend.launcher.triton_files import find_triton; f = find_triton();"
        "assert f.server.exists() and f.stub.exists(); assert 'pytriton' not in sys.modules"
    )
    if not any((Path(p) / "pytriton").is_dir() for p in sys.path):
        with pytest.raises(ConfigError):
            find_triton()
        return
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_ensemble_over_the_model_is_told_of(tmp_path: Path) -> None:
    for name, text in {
        "front": 'platform: "ensemble"\nensemble_scheduling { step [ { model_name: "morph" model_version: -1 } ] }',
        "other": 'platform: "ensemble"\nensemble_scheduling { step [ { model_name: "morphology" } ] }',
        "quiet": 'ensemble_scheduling { step [ # { model_name: "morph" }\n ] }',
        "morph": 'name: "morph"\nbackend: "python"',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").write_text(text)
    assert ensembles_over(tmp_path) == ["front"]
    assert warning(["front"]).startswith("warning: the ensemble 'front' has the model 'morph' as a step")
    assert warning([]) == ""


def test_a_port_in_use_names_the_variable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        with pytest.raises(ConfigError, match="is in use: set MORPH_HTTP_PORT"):
            check_port("127.0.0.1", taken.getsockname()[1], "MORPH_HTTP_PORT")
    with pytest.raises(ConfigError, match="not an address"):
        check_port("203.0.113.7", 12345, "MORPH_HTTP_PORT")


@pytest.mark.parametrize(
    "line, severity, text",
    [
        ('I1121 03:02:54.725000 123 model.cc:5] "loaded"', Severity.INFO, "loaded"),
        ('W1121 03:02:54.725000 123 metrics.cc:631] "DCGM unable to start"', Severity.INFO, "DCGM unable to start"),
        ('W1121 03:02:54.725000 1 pinned_memory_manager.cc:273] "something"', Severity.WARNING, "something"),
        ('E1121 03:02:54.725000 1 a_b.cc:7] "bad\\n\\nAt:\\n  x.py(1)"', Severity.ERROR, "bad"),
        ("Traceback (most recent call last):", Severity.PLAIN, "Traceback (most recent call last):"),
        ("+-------+--------+", Severity.INFO, "+-------+--------+"),
        ("| Model | Version |", Severity.INFO, "| Model | Version |"),
        ("", Severity.INFO, ""),
    ],
)
def test_log_lines(line: str, severity: Severity, text: str) -> None:
    assert classify(line + "\n") == (severity, text)


def test_errors_during_the_start_are_held() -> None:
    shown: list[str] = []
    log = LogFilter(shown.append, verbose=False)
    log.feed("a warning of the model\n")
    log.feed('E1121 03:02:54.725000 1 a.cc:7] "bad"\n')
    log.feed("more of it\n")
    assert shown == ["a warning of the model"]
    log.started()
    assert shown[1:] == ["triton error: bad", "more of it"]
    log.feed('E1121 03:02:54.725000 1 a.cc:7] "again"\n')
    assert shown[3:] == ["triton error: again"]


def test_the_manual_that_triton_prints_after_an_unknown_option_is_dropped() -> None:
    shown: list[str] = []
    log = LogFilter(shown.append, verbose=False)
    for line in ("tritonserver: unrecognized option '--foo=1'", "Usage: tritonserver [options]", "  --help"):
        log.feed(line + "\n")
    log.started()
    assert shown == ["tritonserver: unrecognized option '--foo=1'"]


def test_held_errors_can_be_forgotten_and_verbose_shows_all() -> None:
    shown: list[str] = []
    log = LogFilter(shown.append, verbose=False)
    log.feed('E1121 03:02:54.725000 1 a.cc:7] "bad"\n')
    log.started(forget=True)
    assert shown == []
    LogFilter(shown.append, verbose=True).feed('I1121 03:02:54.725000 1 a.cc:7] "fine"\n')
    assert len(shown) == 1


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """Another launcher, with a run folder; its path is the first line that it prints."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import sys, time; from morph_backend.launcher.run_folder import RunFolder; run = RunFolder();"
        "print(run.path, flush=True); sys.stdin.read(); run.remove()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'backend'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_launcher_left_is_swept_at_the_next_start(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    assert folder.parent == tmp_path and sweep_stale() == [], "its owner lives"
    memory = Path("/dev/shm") / f"{folder.name}_x"
    memory.touch()
    marked = {**os.environ, "MORPH_RUN_DIR": str(folder)}
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=marked)
    try:
        owner.kill()
        owner.wait()
        assert sweep_stale() == [], "a process of the run lives"
    finally:
        left.kill()
        left.wait()
    run = RunFolder()
    assert sweep_stale() == [folder]
    assert not folder.exists() and not memory.exists() and run.path.exists()
    run.remove()


def test_an_orderly_end_leaves_nothing_to_sweep(owner: subprocess.Popen[str]) -> None:
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    owner.communicate("")
    assert not folder.exists() and sweep_stale() == []


def test_only_a_runs_own_processes_and_memory_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder()
    own_memory, other = Path("/dev/shm") / f"{run.shm_prefix}x", Path("/dev/shm") / f"morphserve-other-{os.getpid()}"
    own_memory.touch()
    other.touch()
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    marked = {**os.environ, "MORPH_RUN_DIR": str(run.path)}
    own = [subprocess.Popen([sys.executable, "-c", stubborn], env=marked, stdout=subprocess.PIPE) for _ in range(2)]
    alien = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        for process in own:
            assert process.stdout is not None
            process.stdout.readline()
        assert sorted(processes_of(run.path)) == sorted(p.pid for p in own)
        end_processes(run.path, grace_s=0.1)
        assert [p.wait(60) for p in own] == [-9, -9]
        run.remove()
        assert alien.poll() is None and not own_memory.exists() and other.exists() and not run.path.exists()
    finally:
        alien.kill()
        alien.wait()
        other.unlink()


def installed(root: Path, stub: bytes) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / "backends" / "python").mkdir(parents=True)
    (root / "bin" / "tritonserver").write_bytes(b"")
    (root / "backends" / "python" / "triton_python_backend_stub").write_bytes(stub)
    return root


def test_an_installed_triton_is_used_if_its_stub_fits_this_python(tmp_path: Path) -> None:
    own = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    root = installed(tmp_path / "triton", b"\x7fELF " + own.encode() + b" more")
    files = find_installed(root)
    assert files.server == root / "bin" / "tritonserver" and files.stub.parent == files.backend
    with pytest.raises(ConfigError, match=r"runs models in Python 3\.\d+, but this is Python 3\.9: install"):
        find_installed(root, version=(3, 9))
    files.stub.unlink()
    with pytest.raises(ConfigError, match="is no Triton with a Python backend"):
        find_installed(root)


def test_the_stub_of_an_installed_triton_is_copied_and_left_as_it_is(tmp_path: Path) -> None:
    root = installed(tmp_path / "triton", b"stub")
    files = find_installed(root)
    run = RunFolder()
    try:
        copy = run.backends(files) / "python" / "triton_python_backend_stub"
        assert copy.read_bytes() == b"stub" and not copy.samefile(files.stub)
    finally:
        run.remove()
