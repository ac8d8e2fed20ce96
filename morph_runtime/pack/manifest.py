"""`pack.json`: what a pack says of itself. Nothing in it is believed before it has been checked here.

A pack folder holds `pack.json`, one file of slots per rung, the static weights, and the model's small files. A file of
slots has layer i at byte i * stride; the stride is the slot's size rounded up to 4 KiB, the gap is zero.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from morph_runtime import __version__
from morph_runtime.errors import ConfigError
from morph_runtime.weights.jsonfile import read_json

FORMAT = 1
"""Version of the files' form."""
MANIFEST = "pack.json"
STATIC = "static"
ALIGNMENT = 4096
"""Bytes: a page, so that a slot can be read with direct I/O or mapped."""
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files of the checkpoint that a pack takes along where they exist; all small."""
MAX_MANIFEST_BYTES = 4 * 2**20
"""A model of 4,096 layers in a thousand shards stays below."""
REMEDY = "make it again with 'morph pack'"

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal."""
Size = Annotated[int, Meta(ge=0, le=2**53)]
"""Bytes."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the pack."""

    nbytes: Size
    sha256: Digest


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that the pack was made from."""

    nbytes: Size
    mtime_ns: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    """Time of its last change; equal size and time count as unchanged."""
    sha256: Digest


Source = dict[str, SourceFile]
"""config.json and the safetensors of a checkpoint, by name."""


class RungEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rung: which kernels the bytes are for, and how they lie."""

    kernels: dict[str, str]
    """Kernel of each linear."""
    packing: Digest
    """Of what these kernels make of a known weight: PyTorch's int4 layout depends on the CPU, at equal shapes."""
    layout: Digest
    """Of the slot's fields: name, offset, shape, type."""
    slot_bytes: Annotated[int, Meta(ge=1, le=2**48)]
    stride: Annotated[int, Meta(ge=1, le=2**48)]
    """Bytes from a layer to the next, a multiple of 4096."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of `pack.json`."""

    format: int
    product: str
    """Version of this product that made it."""
    torch: str
    """Version of PyTorch that made it; for people, what matters of it is in `RungEntry.packing`."""
    architecture: str
    layers: Annotated[int, Meta(ge=1, le=4096)]
    dtype: str
    """`bfloat16` or `float32`: activations and full-precision weights."""
    order: list[int]
    """Layer order for `morph.order: auto`."""
    ladder: list[str]
    """Rungs below full precision that it holds."""
    rungs: dict[str, RungEntry]
    static_layout: Digest
    source: Source
    files: dict[str, FileEntry]
    """Every file of the pack but `pack.json`."""
    awq: Source | None = None
    """Where W4 comes from; absent: it is rounded to nearest from full precision."""
    cost_hints: dict[str, float] | None = None
    """Measured costs, by name; none are made yet."""

    @property
    def slot_files(self) -> dict[str, RungEntry]:
        """The rungs by name of their file."""
        return {slots_file(rung): entry for rung, entry in self.rungs.items()}


def slots_file(rung: str) -> str:
    """Name of the file that holds a rung's slots."""
    return f"layers.{rung}"


def stride_of(slot_bytes: int) -> int:
    """Bytes from a layer to the next in a file of slots."""
    return -(-slot_bytes // ALIGNMENT) * ALIGNMENT


def is_pack(folder: Path) -> bool:
    """Whether a model folder is a pack."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `pack.json` by itself, without a look at the other files.

    Raises:
        ConfigError: it is no pack of this format and version, or it is damaged; the text says what and the remedy.
    """
    path = folder / MANIFEST
    values = read_json(path, MAX_MANIFEST_BYTES)
    for name, have in (("format", FORMAT), ("product", __version__)):
        if values.get(name) != have:
            raise ConfigError(f"{path}: '{name}' is {values.get(name)!r}, but this version reads {have!r}: {REMEDY}.")
    try:
        manifest = msgspec.convert(values, Manifest)
        _check(manifest)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {str(error).rstrip('.')}; {REMEDY}.") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """What types cannot say; raises ValueError."""
    if sorted(manifest.order) != list(range(manifest.layers)):
        raise ValueError(f"'order' must name each of the layers 0 to {manifest.layers - 1} once")
    if manifest.ladder not in (["w8"], ["w4"], ["w8", "w4"]):
        raise ValueError("'ladder' must be w8, w4, or w8 and w4")
    if set(manifest.rungs) != {"full", *manifest.ladder}:
        raise ValueError("'rungs' must hold full and each rung of 'ladder'")
    slots = manifest.slot_files
    needed = {STATIC, "config.json", *slots}
    for name in manifest.files:
        if name not in needed and name not in COPIED:
            raise ValueError(f"'files' names {_shown(name)}, which no pack has")
    if missing := sorted(needed - set(manifest.files)):
        raise ValueError(f"'files' lacks {missing[0]}")
    for name, entry in slots.items():
        if entry.stride != stride_of(entry.slot_bytes):
            raise ValueError(f"the stride of {name} is {entry.stride}, not {stride_of(entry.slot_bytes)}")
        if manifest.files[name].nbytes != manifest.layers * entry.stride:
            raise ValueError(f"{name} has {manifest.files[name].nbytes} bytes, not {manifest.layers} slots")
    if "config.json" not in manifest.source:
        raise ValueError("'source' lacks config.json")
    if manifest.source["config.json"].sha256 != manifest.files["config.json"].sha256:
        raise ValueError("its config.json is not that of its source")


def _shown(name: str) -> str:
    return repr(re.sub(r"[^\x20-\x7e]", "?", name)[:80])
