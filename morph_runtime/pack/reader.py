"""An open pack: checked once at start, then read with pread straight into slots."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import Rung
from morph_runtime.pack.digests import file_digest, layout_digest, open_regular, packing_digest
from morph_runtime.pack.manifest import COPIED, REMEDY, STATIC, Source, read_manifest, slots_file
from morph_runtime.weights.packed import PackedBytes
from morph_runtime.weights.pread import read_exactly
from morph_runtime.weights.slots import LayerSlots
from morph_runtime.weights.static import StaticWeights


class PackReader(PackedBytes):
    """The files of a pack, open."""

    def __init__(self, folder: Path) -> None:
        """Read pack.json, open every file and compare sizes, and the digests of the small ones.

        Raises:
            ConfigError: another format or version, or a file that is missing, cut short or changed.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._files: dict[str, int] = {}
        try:
            for name, entry in self.manifest.files.items():
                self._files[name] = open_regular(folder / name)
                size = os.fstat(self._files[name]).st_size
                if size != entry.nbytes:
                    raise ConfigError(
                        f"{folder / name} has {size} bytes, but pack.json says {entry.nbytes}: the pack is incomplete "
                        f"or was changed; {REMEDY}."
                    )
            self._compare([name for name in self.manifest.files if name in COPIED])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every file; reading is an error from here on."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    @property
    def from_awq(self) -> bool:
        """Whether the W4 slots come from an AWQ checkpoint."""
        return self.manifest.awq is not None

    def read_layer(self, layer: int, rung: Rung, slot: Tensor) -> None:
        """Read a layer."""
        name = slots_file(rung)
        read_exactly(self._files[name], self.folder / name, layer * self.manifest.rungs[rung].stride, slot)

    def read_static(self, slot: Tensor) -> None:
        """Read the static weights."""
        read_exactly(self._files[STATIC], self.folder / STATIC, 0, slot)

    def check_settings(self, dtype: torch.dtype, rungs: tuple[Rung, ...], layers: int) -> None:
        """Compare with what this server is to run.

        Raises:
            ConfigError: another type, another number of layers, or a rung that the pack lacks.
        """
        asked = str(dtype).removeprefix("torch.")
        if asked != self.manifest.dtype:
            raise ConfigError(
                f"{self.folder} is packed for {self.manifest.dtype}, but model.dtype asks for {asked}: "
                f"set model.dtype, or {REMEDY} --dtype {asked}."
            )
        if layers != self.manifest.layers:
            raise ConfigError(
                f"{self.folder}: config.json has {layers} layers, pack.json {self.manifest.layers}: {REMEDY}."
            )
        for rung in rungs:
            if rung not in self.manifest.rungs:
                raise ConfigError(
                    f"{self.folder} has no {rung}, which morph.ladder asks for: set morph.ladder to "
                    f"{','.join(self.manifest.ladder)}, or {REMEDY} --ladder {','.join(rungs[1:])}."
                )

    def check_layouts(self, slots: LayerSlots, static: StaticWeights) -> None:
        """Compare with the kernels and layouts that this server uses.

        Raises:
            ConfigError: the bytes are for another kernel, packing or layout.
        """
        for rung in slots.rungs:
            entry = self.manifest.rungs[rung]
            for linear, kernel in slots.kernel_names(rung).items():
                if entry.kernels.get(linear) != kernel:
                    raise ConfigError(
                        f"{self.folder} is packed for the {rung} kernel '{entry.kernels.get(linear)}' of '{linear}', "
                        f"but here '{kernel}' serves it: set kernels.{rung}, or {REMEDY} on this machine."
                    )
            if entry.packing != packing_digest(slots, rung):
                raise ConfigError(
                    f"{self.folder} is packed for another CPU or PyTorch ({self.manifest.torch}, here "
                    f"{torch.__version__}), whose {rung} kernels lay out weights differently: {REMEDY} on this machine."
                )
            if (entry.slot_bytes, entry.layout) != (slots.slot_bytes(rung), layout_digest(slots.layout(rung))):
                raise ConfigError(f"{self.folder} has {rung} slots of another layout than this version: {REMEDY}.")
        sizes = self.manifest.files[STATIC].nbytes, static.static_bytes
        if sizes[0] != sizes[1] or self.manifest.static_layout != layout_digest(static.layout):
            raise ConfigError(f"{self.folder} has static weights of another layout than this version: {REMEDY}.")

    def verify(self) -> None:
        """Read every byte and compare digests.

        Raises:
            ConfigError: a file has changed since the pack was made.
        """
        self._compare(list(self.manifest.files))

    def check_source(self, folder: Path, awq: bool = False) -> None:
        """Make sure that the checkpoint that the pack was made from has not changed.

        Files of equal size and time of change count as unchanged; others are read.

        Args:
            folder: of the checkpoint.
            awq: whether it is the one that W4 comes from.

        Raises:
            ConfigError: a file is missing or differs.
        """
        source: Source = (self.manifest.awq or {}) if awq else self.manifest.source
        if awq and not self.from_awq:
            raise ConfigError(f"{self.folder} has no W4 from an AWQ checkpoint: {REMEDY} --awq {folder}.")
        for name, entry in source.items():
            # A name of pack.json is used as a path only if it could be one that packing has written.
            if name != "config.json" and (Path(name).name != name or not name.endswith(".safetensors")):
                raise ConfigError(
                    f"{self.folder}: pack.json names the source file {name!r}, which cannot be: {REMEDY}."
                )
            try:
                found = (folder / name).stat()
            except OSError as error:
                raise ConfigError(
                    f"{self.folder} was not made from {folder}: {name}: {error.strerror}; {REMEDY}."
                ) from None
            if (found.st_size, found.st_mtime_ns) == (entry.nbytes, entry.mtime_ns):
                continue
            if found.st_size != entry.nbytes or file_digest(folder / name).sha256 != entry.sha256:
                raise ConfigError(
                    f"{self.folder} is stale: {folder / name} has changed since the pack was made; {REMEDY}."
                )

    def _compare(self, names: list[str]) -> None:
        for name in names:
            if file_digest(self.folder / name).sha256 != self.manifest.files[name].sha256:
                raise ConfigError(
                    f"{self.folder / name} is not the file that was packed (its checksum differs): {REMEDY}."
                )
