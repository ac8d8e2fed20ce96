"""Whatever is in a model folder, the engine starts and serves with it, or refuses it with one sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.conftest import make_model
from engine.hostile_folder import apply, changes, start
from morph_runtime.config import EngineConfig
from morph_runtime.pack.make import make_pack
from tiny_model import tiny_tokenizer
from weights.awq_packer import make_awq

EXAMPLES = int(os.environ.get("MORPH_TEST_EXAMPLES", "12"))
CORPUS = json.loads((Path(__file__).parents[2] / "corpora" / "model_folders.json").read_text())
"""Changes that are tried each time, with a part of what is said then; what a long run finds goes there."""


@pytest.fixture(scope="module", params=["checkpoint", "awq", "pack"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder; in that of AWQ it is the second checkpoint that is changed."""
    base = make_model(tmp_path_factory.mktemp("folders") / "base", kv_heads=4)
    tiny_tokenizer(200 + 56).save(str(base / "tokenizer.json"))
    if request.param == "awq":
        return make_awq(base, base.parent / "awq")
    if request.param == "pack":
        values: dict[str, Any] = {"model": {"path": str(base), "dtype": "float32"}, "morph": {"ladder": ["w4"]}}
        make_pack(EngineConfig.from_mapping(values), base.parent / "pack")
        return base.parent / "pack"
    return base


def attempt(folder: Path, work: Path, made: list[dict[str, Any]]) -> str:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)
    for change in made:
        apply(work, change)
    if folder.name == "awq":
        return start(folder.parent / "base", work)
    return start(work)


def test_the_folders_are_good_unchanged(folder: Path, tmp_path: Path) -> None:
    assert attempt(folder, tmp_path / "work", []) == ""


@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
def test_any_change_is_served_or_refused(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    attempt(folder, tmp_path / "work", data.draw(changes(folder)))


def test_what_was_thought_of_once_is_refused_for_good(folder: Path, tmp_path: Path) -> None:
    ours = [made for made in CORPUS if folder.name in made["said"]]
    assert ours
    for made in ours:
        answer, expected = attempt(folder, tmp_path / "work", made["changes"]), made["said"][folder.name]
        assert expected in answer if expected else not answer, (made["name"], answer)
