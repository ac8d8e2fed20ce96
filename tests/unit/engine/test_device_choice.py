"""A GPU that cannot be used is one sentence with the remedy, at start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.conftest import EngineFactory
from morph_runtime.config import EngineConfig
from morph_runtime.engine import build
from morph_runtime.errors import ConfigError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_device_cuda_is_refused(
    tiny_model: Path, engines: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CUDA_PACKAGES", {})
    with pytest.raises(ConfigError, match=r"device is cuda, but .* MORPH_DEVICE=cpu\.$"):
        engines(tiny_model, device="cuda")


def test_missing_packages_are_named_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        build, "CUDA_PACKAGES", {"no-such-one": "no_such_one", "torch": "torch", "nor-this": "nor_this"}
    )
    with pytest.raises(ConfigError, match=r"no-such-one, nor-this cannot be imported: install morphserve\[cuda\]"):
        build.open_device(EngineConfig(device="cuda"))


def test_an_unknown_device_is_refused_by_its_field() -> None:
    with pytest.raises(ConfigError, match="device must be one of cpu, cuda"):
        EngineConfig.from_mapping({"device": "tpu"})
