"""Order files: what `morph profile` writes, and `morph.order` and `morph pack --order` read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import Rung
from morph_runtime.morph.levels import parse_order
from morph_runtime.weights.jsonfile import read_json
from morph_runtime.weights.slots import LayerSlots

FORMAT = 1
"""Version of the file's form."""
MAX_BYTES = 4 * 2**20
"""4,096 layers at two rungs stay below."""
PROBE_ROWS = 8
"""Rows of the first layer's qkv by which a model is known."""
REMEDY = "make one with 'morph profile'"


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's scores when it was chosen (profile.importance)."""

    layer: int
    lts: float
    lrs: float
    mds: float
    lis: float


class RungOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The order for one rung."""

    order: list[int]
    """Layer numbers, the first to be quantized first."""
    scores: list[Score]
    """In that order."""


class TextEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The text that the scores were taken on."""

    name: str
    sha256: str
    """Of the characters that were read, in UTF-8."""
    windows: int
    window_tokens: int


class OrderFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    format: int
    product: str
    """Version that wrote it."""
    torch: str
    device: str
    dtype: str
    model: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    """`fingerprint` of the model."""
    layers: int
    awq: bool
    """Whether its W4 came from an AWQ checkpoint."""
    weights: list[float]
    """Of LTS, LRS and MDS."""
    text: TextEntry
    rungs: dict[str, RungOrder]


def write_order_file(found: OrderFile, path: Path) -> None:
    """Write it, readable by people.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror or error}.") from None


def read_order_file(path: Path) -> OrderFile:
    """Read and check one.

    Raises:
        ConfigError: it cannot be read, has another form, or an order in it is no permutation.
    """
    values = read_json(path, MAX_BYTES)
    if values.get("format") != FORMAT:
        raise ConfigError(f"{path} is not an order file of format {FORMAT}: {REMEDY}.")
    try:
        found = msgspec.convert(values, OrderFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} is not an order file: {error}; {REMEDY}.") from None
    for rung, entry in found.rungs.items():
        if sorted(entry.order) != list(range(found.layers)):
            raise ConfigError(
                f"{path}: the order for {rung} must name each of the layers 0 to {found.layers - 1} once; {REMEDY}."
            )
    return found


def is_order_file(text: str) -> bool:
    """Whether `morph.order` names a file: it ends in `.json`, or has a folder in it."""
    return text.endswith(".json") or os.sep in text


def resolve_order(text: str, slots: Callable[[], LayerSlots], num_layers: int, rung: Rung) -> tuple[int, ...]:
    """The layer order that `morph.order` asks for; of a file, that for `rung`.

    Args:
        text: the setting.
        slots: gives those of the model in host memory, `full` among the rungs; called only for a file.
        num_layers: of the model.
        rung: the deepest of the ladder: the one at which the order matters most.

    Raises:
        ConfigError: the order is none, or its file is of another model or lacks the rung.
    """
    if not is_order_file(text):
        return parse_order(text, num_layers)
    path = Path(text)
    found = read_order_file(path)
    if found.layers != num_layers or found.model != fingerprint(slots()):
        raise ConfigError(f"morph.order: {path} was made for another model: make one for this with 'morph profile'.")
    if rung not in found.rungs:
        raise ConfigError(
            f"morph.order: {path} has no order for {rung}, the deepest rung of morph.ladder, only for: "
            f"{', '.join(found.rungs)}; make one with 'morph profile --rung {rung}'."
        )
    return tuple(found.rungs[rung].order)


def fingerprint(slots: LayerSlots) -> str:
    """What a model is known by: SHA-256 of norms and some weights of its first layer, in bfloat16. It is the same for
    a checkpoint and its packs, and differs between models of one shape.

    Args:
        slots: in host memory, `full` among the rungs.

    Raises:
        ConfigError: the checkpoint has changed since it was opened.
    """
    slot = torch.empty(slots.slot_bytes("full"), dtype=torch.uint8)
    slots.fill(0, "full", slot)
    layer = slots.bind(0, "full", slot)
    digest = hashlib.sha256()
    for tensor in _probes(layer.input_norm, layer.post_norm, layer.qkv.tensors["weight"][:PROBE_ROWS]):
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _probes(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    return [tensor.to(torch.bfloat16).contiguous() for tensor in tensors]
