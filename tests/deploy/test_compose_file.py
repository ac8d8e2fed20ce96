"""What docker-compose.yml hands on, without starting anything."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from morph_runtime.config import ENVIRONMENT
from triton_server import ROOT

FILES = {"MORPH_AWQ", "MORPH_ORDER", "MORPH_PACK_SOURCE"}
"""They name files beside the model, which are not mounted: a pack holds what they would give."""


def services() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"])


@pytest.mark.parametrize("name", ["check", "triton", "check-cpu", "triton-cpu"])
def test_every_setting_reaches_the_check_and_the_server(name: str) -> None:
    given = services()[name]["environment"]
    fixed = {"MORPH_MODEL": "/model", "MORPH_COST_CACHE": "/tmp/costs"}
    fixed |= {"MORPH_DEVICE": "cpu" if name.endswith("cpu") else "cuda"}
    others = (
        *("MORPH_DRAIN_S", "MORPH_INSTANCES", "MORPH_LOG_LEVEL", "MORPH_LOG_VERBOSE", "MORPH_TRITON_ARGS"),
        "MORPH_ADMIN_KEY",
    )
    passed = {name: f"${{{name}:-{'30' if name == 'MORPH_DRAIN_S' else ''}}}" for name in (*ENVIRONMENT, *others)}
    assert given == {name: text for name, text in {**passed, **fixed}.items() if name not in FILES}


def test_settings_stand_nowhere_but_in_environments() -> None:
    """Compose refuses a service with a key that it does not know."""
    for name, service in services().items():
        assert not [key for key in service if key.startswith("MORPH_")], name
