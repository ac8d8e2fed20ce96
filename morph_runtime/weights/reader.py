"""Reads a Hugging Face checkpoint straight into its place; the files are the only other copy of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.weights.jsonfile import read_json
from morph_runtime.weights.safetensors_file import SafetensorsFile, TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUFFER_BYTES = 2**20
"""Staging of a read that converts the type; freed when the read ends."""


class CheckpointReader:
    """The tensors of a checkpoint folder by name. Threads may read at the same time."""

    def __init__(self, folder: Path | str) -> None:
        """Open every shard and check its header.

        Raises:
            ConfigError: no safetensors, a missing or damaged shard, or an index that does not fit its shards.
        """
        self._folder = Path(folder)
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self._places = self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every file; reading is an error from here on."""
        for file in self._files.values():
            file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies, for errors."""
        return self._folder

    @property
    def paths(self) -> list[Path]:
        """Its safetensors files."""
        return [file.path for file in self._files.values()]

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a tensor.

        Raises:
            ConfigError: the checkpoint has no such tensor.
        """
        return self._place(name)[1]

    def check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        """Make sure that a tensor is there, of `shape`, and of `dtype` or, if that is None, of floating point.

        Raises:
            ConfigError: it is not; the text names the tensor and both shapes or types.
        """
        info = self.info(name)
        if info.shape != shape:
            raise ConfigError(
                f"{self._folder}: tensor '{name}' has the shape {list(info.shape)}, "
                f"but config.json needs {list(shape)}."
            )
        if dtype is None and not info.dtype.is_floating_point:
            raise ConfigError(f"{self._folder}: tensor '{name}' has the type {info.dtype}, not a floating-point one.")
        if dtype is not None and info.dtype != dtype:
            raise ConfigError(f"{self._folder}: tensor '{name}' has the type {info.dtype}, not {dtype}.")

    def read(self, name: str, dtype: torch.dtype | None = None, first_row: int = 0, rows: int | None = None) -> Tensor:
        """A new tensor with rows [first_row, first_row + rows) of a tensor, all if `rows` is None.

        `dtype` is the checkpoint's own if None.

        Raises:
            ConfigError: as `read_into`.
        """
        info = self.info(name)
        shape = (info.shape[0] - first_row if rows is None else rows, *info.shape[1:])
        out = torch.empty(shape, dtype=info.dtype if dtype is None else dtype)
        self.read_into(name, out, first_row)
        return out

    def read_into(self, name: str, destination: Tensor, first_row: int = 0) -> None:
        """Read rows [first_row, first_row + n) of a tensor into `destination`, converted where the types differ.

        Equal types go straight from the file into the destination's memory; else through a buffer of 1 MiB.

        Args:
            name: as in the checkpoint.
            destination: [n, ...] contiguous on CPU; the trailing extents are the tensor's.
            first_row: along the first dimension.

        Raises:
            ConfigError: no such tensor, extents that do not fit, or a file cut short.
        """
        file, info = self._place(name)
        rows = destination.shape[0]
        if info.shape[1:] != tuple(destination.shape[1:]) or not 0 <= first_row <= first_row + rows <= info.shape[0]:
            raise ConfigError(
                f"{self._folder}: tensor '{name}' has the shape {list(info.shape)}: rows {first_row} to "
                f"{first_row + rows} of the shape {list(destination.shape[1:])} cannot be read from it."
            )
        flat = destination.view(-1)
        offset = info.offset + first_row * (info.nbytes // info.shape[0] if info.shape[0] else 0)
        if flat.dtype == info.dtype:
            file.read(offset, flat.view(torch.uint8))
            return
        buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        step = BUFFER_BYTES // info.dtype.itemsize
        for first in range(0, flat.numel(), step):
            piece = flat[first : first + step]
            raw = buffer[: piece.numel() * info.dtype.itemsize]
            file.read(offset + first * info.dtype.itemsize, raw)
            piece.copy_(raw.view(info.dtype))

    def _place(self, name: str) -> tuple[SafetensorsFile, TensorInfo]:
        try:
            return self._places[name]
        except KeyError:
            raise ConfigError(f"{self._folder}: the checkpoint has no tensor '{name}'.") from None

    def _open(self) -> Mapping[str, tuple[SafetensorsFile, TensorInfo]]:
        index = self._folder / INDEX
        if index.is_file():
            return self._open_shards(index)
        if (self._folder / SINGLE).is_file():
            file = self._files[SINGLE] = SafetensorsFile(self._folder / SINGLE)
            return {name: (file, info) for name, info in file.tensors.items()}
        pickled = sorted(p.name for p in self._folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise ConfigError(
                f"{self._folder} holds pickled weights ({pickled[0]}), which are not read because a pickle can run "
                "code: convert them with transformers' save_pretrained(folder, safe_serialization=True)."
            )
        raise ConfigError(f"{self._folder} holds neither {SINGLE} nor {INDEX}.")

    def _open_shards(self, index: Path) -> Mapping[str, tuple[SafetensorsFile, TensorInfo]]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index}: 'weight_map' must be an object of tensor names and files.")
        places: dict[str, tuple[SafetensorsFile, TensorInfo]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ConfigError(f"{index}: {shard!r} is not the name of a safetensors file in the same folder.")
            if shard not in self._files:
                self._files[shard] = SafetensorsFile(self._folder / shard)
            file = self._files[shard]
            if name not in file.tensors:
                raise ConfigError(f"{index}: the shard {shard} has no tensor {name!r}.")
            places[name] = (file, file.tensors[name])
        return places
