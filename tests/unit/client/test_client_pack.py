"""`morph pack` hands everything to the server part's own command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest

from morph_client.cli import pack

Morph = Callable[..., Any]


def test_pack_becomes_the_servers_command_with_its_arguments(morph: Morph, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(pack.os, "execv", lambda *args: seen.append(args))
    result = morph("pack", "/models/x", "--out", "/packs/x", "--awq", "/models/y", "--kernel", "w4=nibble")
    assert result.exit_code == 0, result.stderr
    ((program, arguments),) = seen
    assert program == sys.executable
    assert arguments[1:3] == ["-m", "morph_runtime.pack"]
    assert arguments[3:] == ["--out=/packs/x", "--awq=/models/y", "--kernel=w4=nibble", "--", "/models/x"]


def test_without_the_server_part_packing_names_the_remedy(morph: Morph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    result = morph("pack", "/models/x", "--verify")
    assert result.exit_code == 2
    assert "pip install 'morphserve[server]'" in result.stderr
