"""One safetensors file: its header checked, its tensors read with pread.

Format: 8 bytes of header length (little endian), the header as JSON, then the data
(github.com/huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.weights.pread import read_exactly

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
"""The limit of the safetensors library itself."""

DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Byte of the file at which it begins."""
    nbytes: int


class SafetensorsFile:
    """An open file. Reads are positional, so threads may share it."""

    def __init__(self, path: Path) -> None:
        """Open and check.

        Raises:
            ConfigError: the file cannot be opened, is cut short, or its header is damaged; the text names it.
        """
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # to open a pipe would wait for ever
        except OSError as error:
            raise ConfigError(f"{path} cannot be opened: {error.strerror}.") from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise ConfigError(f"{path} is not a file.")
            self.tensors: Mapping[str, TensorInfo] = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; reading is an error from here on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, offset: int, destination: Tensor) -> None:
        """Read bytes straight into `destination` (uint8 [n], contiguous) from byte `offset` of the file.

        Raises:
            ConfigError: the file ends early or cannot be read; it was changed after it was opened.
        """
        read_exactly(self._fd, self.path, offset, destination)

    def _read_header(self) -> dict[str, TensorInfo]:
        size = os.fstat(self._fd).st_size
        prefix = os.pread(self._fd, 8, 0)
        if len(prefix) < 8:
            raise ConfigError(f"{self.path} is cut short: it has {size} bytes and no header.")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise ConfigError(f"{self.path} is no safetensors file: its header would take {length} bytes.")
        if 8 + length > size:
            raise ConfigError(f"{self.path} is cut short: its header takes {length} bytes, the file has {size}.")
        try:
            header = json.loads(os.pread(self._fd, length, 8), object_pairs_hook=_refuse_duplicates)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.path} has a damaged header: {error}.") from None
        if not isinstance(header, dict):
            raise ConfigError(f"{self.path} has a damaged header: it is no JSON object.")
        found = [self._entry(n, v, 8 + length, size) for n, v in header.items() if n != "__metadata__"]
        end, last = 0, ""
        for info in sorted(found, key=lambda i: (i.offset, i.nbytes)):
            if info.offset < end:
                raise ConfigError(f"{self.path} has a damaged header: {info.name!r} overlaps {last!r}.")
            end, last = info.offset + info.nbytes, info.name
        return {info.name: info for info in found}

    def _entry(self, name: str, value: Any, start: int, size: int) -> TensorInfo:
        def damaged(what: str) -> ConfigError:
            return ConfigError(f"{self.path} has a damaged header: tensor {name!r} {what}.")

        if not isinstance(value, dict):
            raise damaged("is no object")
        kind, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
        if not isinstance(kind, str) or kind not in DTYPES:
            raise damaged(f"has the unknown type {kind!r}")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise damaged(f"has the bad shape {shape!r:.200}")
        if len(shape) > MAX_DIMENSIONS:
            raise damaged(f"has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
            raise damaged(f"has the bad offsets {offsets!r:.200}")
        nbytes = prod(shape) * DTYPES[kind].itemsize
        if offsets[1] - offsets[0] != nbytes:
            raise damaged(f"has {offsets[1] - offsets[0]} bytes where its shape and type need {nbytes}")
        if start + offsets[1] > size:
            raise ConfigError(
                f"{self.path} is cut short: tensor {name!r} ends at byte {start + offsets[1]}, "
                f"the file has {size} bytes."
            )
        return TensorInfo(name, DTYPES[kind], tuple(shape), start + offsets[0], nbytes)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values
