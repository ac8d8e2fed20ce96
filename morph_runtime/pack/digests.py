"""What identifies files, slot layouts and packings."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import torch

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.linear import LinearShape
from morph_runtime.kernels.rung import GROUP, Rung
from morph_runtime.pack.manifest import Source, SourceFile
from morph_runtime.weights.layout import SlotLayout
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.slots import LayerSlots

BLOCK_BYTES = 2**20
PROBE = LinearShape("probe", 2 * GROUP, 2 * GROUP)
"""A weight whose rows and columns are multiples of every kernel's blocks."""


def open_regular(path: Path) -> int:
    """Open a file for reading.

    Raises:
        ConfigError: it is missing, unreadable, or not a plain file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened: {error.strerror}.") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"{path} is not a plain file.")
    return fd


def file_digest(path: Path) -> SourceFile:
    """Size, time of change and digest of a file, all of the same state.

    Raises:
        ConfigError: it cannot be read, or it changes meanwhile.
    """
    fd = open_regular(path)
    try:
        before, digest, block = os.fstat(fd), hashlib.sha256(), bytearray(BLOCK_BYTES)
        while count := os.readv(fd, [block]):
            digest.update(memoryview(block)[:count])
        after = os.fstat(fd)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    finally:
        os.close(fd)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ConfigError(f"{path} changes while it is read: try again when it is complete.")
    return SourceFile(after.st_size, after.st_mtime_ns, digest.hexdigest())


def source_of(reader: CheckpointReader) -> Source:
    """What identifies a checkpoint: its config.json and every safetensors file that it consists of.

    Raises:
        ConfigError: as `file_digest`.
    """
    return {path.name: file_digest(path) for path in (reader.folder / "config.json", *reader.paths)}


def layout_digest(layout: SlotLayout) -> str:
    """Equal for slots whose bytes mean the same."""
    lines = (f"{field.name} {field.offset} {list(field.shape)} {field.dtype}\n" for field in layout.fields)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def packing_digest(slots: LayerSlots, rung: Rung) -> str:
    """Of the bytes that the kernels of a rung make of a known weight, on this machine."""
    numbers = torch.arange(PROBE.out_features * PROBE.in_features) * 40503 % 65521  # exact, and no random generator
    weight = numbers.view(PROBE.out_features, PROBE.in_features).float() / 65521 - 0.5
    digest = hashlib.sha256()
    for kernel in slots.kernels(rung):
        out = {field.name: torch.zeros(field.shape, dtype=field.dtype) for field in kernel.fields(PROBE)}
        kernel.pack(weight.to(kernel.dtype), out)
        for name, tensor in out.items():
            digest.update(name.encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
