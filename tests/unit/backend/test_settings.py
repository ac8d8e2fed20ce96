from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from morph_backend.settings import (
    BackendSettings,
    backend_settings,
    checkout_root,
    has_queue_timeouts,
    load_model_file,
)
from morph_runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def parameters(**values: str) -> dict[str, Any]:
    return {"parameters": {name: {"string_value": value} for name, value in values.items()}}


def test_defaults_and_values() -> None:
    assert backend_settings({}) == BackendSettings()
    settings = backend_settings(
        parameters(REPORT_CUSTOM_METRICS="False", SENDER_THREADS="4", QUEUE_NUDGE="false", OTHER="x")
    )
    assert settings == BackendSettings(report_custom_metrics=False, sender_threads=4, queue_nudge=False)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"REPORT_CUSTOM_METRICS": "yes"}, "REPORT_CUSTOM_METRICS must be true or false"),
        ({"SENDER_THREADS": "0"}, "SENDER_THREADS must be between 1 and 64"),
        ({"CANCEL_POLL_MS": "fast"}, "CANCEL_POLL_MS must be a whole number"),
    ],
)
def test_bad_values(values: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        backend_settings(parameters(**values))


def test_the_environment_wins_over_model_json(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"model": {"path": "a"}, "scheduler": {"max_num_seqs": 3}}))
    assert load_model_file(file, {}).config.scheduler.max_num_seqs == 3
    config = load_model_file(file, {"MORPH_MAX_NUM_SEQS": "5", "MORPH_MODEL": "b"}).config
    assert (config.scheduler.max_num_seqs, config.model.path) == (5, "b")


@pytest.mark.parametrize("text", ["{", "[]", '{"modle": {}}', '{"scheduler": {"line": 0}}'])
def test_a_bad_model_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ConfigError):
        load_model_file(tmp_path / "model.json", {})


def test_a_missing_model_json_means_defaults(tmp_path: Path) -> None:
    assert load_model_file(tmp_path / "model.json", {"MORPH_MODEL": "m"}).config.model.path == "m"


def test_the_packaged_repository_is_the_checkouts() -> None:
    from morph_backend.launcher.run_folder import MODEL_PY

    assert checkout_root() == ROOT
    packaged = ROOT / "backend" / "morph_backend" / "repository"
    repository = ROOT / "model_repository" / "morph"
    assert (packaged / "config.pbtxt").read_text() == (repository / "config.pbtxt").read_text()
    assert (packaged / "model.json").read_text() == (repository / "1" / "model.json").read_text()
    assert (repository / "1" / "model.py").read_text() == MODEL_PY


def test_the_configuration_has_the_tensors_of_the_contract() -> None:
    import re

    config = (ROOT / "model_repository" / "morph" / "config.pbtxt").read_text()
    document = (ROOT / "docs" / "wire.md").read_text()
    for title, section in (("## Inputs", "input"), ("## Outputs", "output")):
        table = document.split(title)[1].split("## ")[0]
        named = set()
        for row in table.splitlines():
            if row.startswith("| `"):
                named |= set(re.findall(r"`(\w+)`", row.split("|")[1]))
        block = re.search(rf"^{section} \[(.*?)^\]", config, re.S | re.M)
        assert block is not None
        assert set(re.findall(r'name: "(\w+)"', block.group(1))) == named


def test_without_a_checkout_the_packaged_repository_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from morph_backend.launcher import run_folder
    from morph_backend.launcher.launch_settings import launch_settings

    monkeypatch.setattr(run_folder, "checkout_root", lambda: None)
    run = run_folder.RunFolder()
    try:
        folder = run.repository(launch_settings([], {}))
        for name in ("config.pbtxt", "1/model.json", "1/model.py"):
            assert (folder / "morph" / name).read_text() == (ROOT / "model_repository" / "morph" / name).read_text()
    finally:
        run.remove()
    assert not run.path.exists()


@pytest.mark.parametrize(
    "policy, ends",
    [
        ({"allow_timeout_override": True, "default_timeout_microseconds": "60000000"}, True),
        ({"allow_timeout_override": True, "default_timeout_microseconds": "9", "timeout_action": "DELAY"}, False),
        ({"allow_timeout_override": True, "default_timeout_microseconds": "0"}, False),
        ({"default_timeout_microseconds": "60000000"}, False),
        (None, False),
    ],
)
def test_nudges_need_a_queue_that_ends_expired_requests(policy: dict[str, Any] | None, ends: bool) -> None:
    assert has_queue_timeouts({"dynamic_batching": {"default_queue_policy": policy}}) is ends
    assert has_queue_timeouts({}) is False
