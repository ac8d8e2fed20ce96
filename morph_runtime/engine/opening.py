"""Opens the weights that the settings name: a checkpoint as it is, a pack of one, or random ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from morph_runtime.config import EngineConfig
from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import Rung
from morph_runtime.morph.levels import LevelPlan
from morph_runtime.pack.reader import PackReader
from morph_runtime.profile.order_file import resolve_order
from morph_runtime.weights.awq import AwqCheckpoint
from morph_runtime.weights.dummy import DummyBytes, check_no_weights
from morph_runtime.weights.packed import PackedBytes
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.slots import LayerSlots
from morph_runtime.weights.spec import ModelSpec
from morph_runtime.weights.static import StaticWeights

CPU = torch.device("cpu")


@dataclass(frozen=True)
class OpenModel:
    """A model whose slots can be filled."""

    spec: ModelSpec
    slots: LayerSlots
    static: StaticWeights
    plan: LevelPlan
    reader: CheckpointReader | PackedBytes
    """Where the weights come from."""

    def host_slots(self) -> LayerSlots:
        """Full precision as it lies in host memory before it goes to a GPU."""
        return _host_slots(self.spec, self.reader, self.slots.dtype)

    @property
    def packed_awq(self) -> bool:
        """Whether it is a pack whose W4 comes from an AWQ checkpoint."""
        return isinstance(self.reader, PackedBytes) and self.reader.from_awq


def open_checkpoint(config: EngineConfig, folder: Path, device: torch.device = CPU) -> OpenModel:
    """A Hugging Face checkpoint, and the AWQ checkpoint beside it if one is set.

    Raises:
        ConfigError: a checkpoint is damaged or cannot be served with these settings.
    """
    if config.model.pack_source:
        raise ConfigError(f"model.pack_source is set, but {folder} is not a pack: unset it (MORPH_PACK_SOURCE).")
    spec, reader = ModelSpec.from_folder(folder), CheckpointReader(folder)
    awq = AwqCheckpoint(config.model.awq_path, spec, reader) if config.model.awq_path else None
    slots = LayerSlots(spec, reader, dtype_of(config), _rungs(config), device, forced_kernels(config), awq)
    static = StaticWeights(spec, reader, slots.dtype)
    order = resolve_order(
        config.morph.order, lambda: _host_slots(spec, reader, slots.dtype), spec.layers, slots.rungs[-1]
    )
    return OpenModel(spec, slots, static, LevelPlan(order, slots.rungs[1:]), reader)


def open_pack(config: EngineConfig, folder: Path, device: torch.device = CPU) -> OpenModel:
    """A pack, checked against the settings and this machine.

    Raises:
        ConfigError: it is damaged, stale, or made for something else; the text says what and the remedy.
    """
    if config.model.awq_path:
        raise ConfigError(
            f"model.awq_path is set, but {folder} is a pack, whose W4 is its own: unset it (MORPH_AWQ), or pack the "
            f"model with --awq {config.model.awq_path}."
        )
    pack = PackReader(folder)
    try:
        spec, dtype, rungs = ModelSpec.from_folder(folder), dtype_of(config), _rungs(config)
        # A GPU makes its own W8 and W4: it reads but the full precision of a pack.
        read = rungs if device.type == "cpu" else rungs[:1]
        if read != rungs and pack.from_awq and "w4" in rungs:
            raise ConfigError(
                f"{folder} has the W4 of an AWQ checkpoint in a CPU's layout: on a GPU, set MORPH_MODEL and "
                "MORPH_AWQ to the two checkpoints themselves."
            )
        pack.check_settings(dtype, read, spec.layers)
        slots = LayerSlots(spec, pack, dtype, rungs, device, forced_kernels(config))
        static = StaticWeights(spec, pack, dtype)
        pack.check_layouts(slots if read == rungs else LayerSlots(spec, pack, dtype, read), static)
        if config.model.pack_source:
            pack.check_source(Path(config.model.pack_source))
        if config.model.verify_pack:
            pack.verify()
        if config.morph.order == "auto":
            order = tuple(pack.manifest.order)
        else:
            order = resolve_order(config.morph.order, lambda: _host_slots(spec, pack, dtype), spec.layers, rungs[-1])
    except BaseException:
        pack.close()
        raise
    return OpenModel(spec, slots, static, LevelPlan(order, rungs[1:]), pack)


def open_dummy(config: EngineConfig, folder: Path, device: torch.device = CPU) -> OpenModel:
    """Random weights in the shapes of a folder's config.json.

    Raises:
        ConfigError: that cannot be read or served, or the settings name weights.
    """
    check_no_weights(config.model.awq_path, config.model.pack_source)
    spec, reader = ModelSpec.from_folder(folder), DummyBytes(device)
    slots = LayerSlots(spec, reader, dtype_of(config), _rungs(config), device, forced_kernels(config))
    static = StaticWeights(spec, reader, slots.dtype)
    reader.attach(slots, static)
    order = resolve_order(
        config.morph.order, lambda: _host_slots(spec, reader, slots.dtype), spec.layers, slots.rungs[-1]
    )
    return OpenModel(spec, slots, static, LevelPlan(order, slots.rungs[1:]), reader)


def dtype_of(config: EngineConfig) -> torch.dtype:
    """Type of activations and full-precision weights."""
    return torch.float32 if config.model.dtype == "float32" else torch.bfloat16


def forced_kernels(config: EngineConfig) -> dict[Rung, str]:
    """Kernels that the settings name, by rung; empty text is free choice."""
    return {"full": config.kernels.full, "w8": config.kernels.w8, "w4": config.kernels.w4}


def _host_slots(spec: ModelSpec, reader: CheckpointReader | PackedBytes, dtype: torch.dtype) -> LayerSlots:
    return LayerSlots(spec, reader, dtype, ("full",))


def _rungs(config: EngineConfig) -> tuple[Rung, ...]:
    return ("full", *(cast(Rung, rung) for rung in config.morph.ladder))
