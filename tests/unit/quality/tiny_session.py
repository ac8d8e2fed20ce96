"""Tiny models opened for measuring, and windows of random tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import open_model
from morph_runtime.profile.forward import CpuForward
from morph_runtime.profile.text import Windows
from morph_runtime.profile.weights import CpuLayerStore, Form

CPU = torch.device("cpu")
VOCAB = 193


def open_store(folder: Path, awq: Path | None = None) -> CpuLayerStore:
    """Every form of a model, in float32; `awq` beside its own W4."""
    settings = {"path": str(folder), "dtype": "float32"}
    model = open_model(EngineConfig.from_mapping({"model": settings, "morph": {"ladder": ["w8", "w4"]}}), CPU)
    forms: tuple[Form, ...] = ("full", "w8", "w4")
    models = dict.fromkeys(forms, model)
    if awq is not None:
        models["awq"] = open_model(EngineConfig.from_mapping({"model": {**settings, "awq_path": str(awq)}}), CPU)
    return CpuLayerStore(models, lambda words: None)


def random_windows(count: int = 3, length: int = 40, lead: int = 0) -> Windows:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, VOCAB, (count, length), generator=generator).tolist()
    return Windows(tuple(map(tuple, tokens)), lead, 4.0, "text", "0" * 64)


def forward_for(store: CpuLayerStore, windows: Windows) -> CpuForward:
    return CpuForward(store, windows.length)
