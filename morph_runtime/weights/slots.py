"""The memory of one decoder layer at each rung: how large it is, how it is filled, how it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.linear import FieldSpec, LinearKernel
from morph_runtime.kernels.registry import select
from morph_runtime.kernels.rung import Rung
from morph_runtime.weights.awq import AwqCheckpoint
from morph_runtime.weights.awq_fill import AwqFiller
from morph_runtime.weights.bound import BoundLinear, LayerWeights
from morph_runtime.weights.fused import FusedLinear, fused_linears
from morph_runtime.weights.layout import SlotLayout
from morph_runtime.weights.norms import check_norms, copy_norms, norm_fields, read_norms
from morph_runtime.weights.packed import PackedBytes
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.spec import ModelSpec

CHUNK_ELEMENTS = 2**18
"""Weights that are quantized at a time: bounds the staging memory of a fill, and how long it holds a core."""

STAGING_BYTES_PER_ELEMENT = 24
"""Peak of the temporaries of `LinearKernel.pack` plus the rows read, per weight of a chunk (float32 pieces)."""


class LayerSlots:
    """How the layers of one model lie in memory at each rung. Norms and biases are part of every rung.

    A slot is a uint8 tensor aligned to 64 bytes. `fill` may run in another thread while a forward uses
    other slots.
    """

    def __init__(
        self,
        spec: ModelSpec,
        reader: CheckpointReader | PackedBytes,
        dtype: torch.dtype,
        rungs: Sequence[Rung] = ("full", "w8", "w4"),
        device: torch.device | None = None,
        forced: Mapping[Rung, str] | None = None,
        awq: AwqCheckpoint | None = None,
    ) -> None:
        """Choose kernels and check every tensor of every layer.

        Args:
            spec: the model.
            reader: its checkpoint, or a pack of it, which has checked itself; must stay open while slots are filled.
            dtype: type of activations and full-precision weights.
            rungs: those that will be used; others need not be possible.
            device: where slots live; CPU if None.
            forced: names of kernels per rung, from the configuration; empty text or absence means free choice.
            awq: where W4 comes from; None: it is made from the full precision. A pack has its own.

        Raises:
            ConfigError: a linear that a rung cannot serve, or a checkpoint that does not fit the model.
        """
        self._spec, self._reader, self.dtype = spec, reader, dtype
        device = device or torch.device("cpu")
        self._linears = fused_linears(spec)
        self._kernels: Mapping[Rung, Sequence[LinearKernel]] = {
            rung: [select(rung, linear.shape, dtype, device, (forced or {}).get(rung, "")) for linear in self._linears]
            for rung in rungs
        }
        self._awq: AwqFiller | None = None
        if isinstance(reader, PackedBytes):
            rescales_v = reader.from_awq and spec.equal_v_and_o
        else:
            if awq is not None and "w4" in rungs:
                self._awq = AwqFiller(spec, awq, reader)
            rescales_v = self._awq is not None and self._awq.rescales_v
            for layer in range(spec.layers):
                self._check_layer(reader, layer)
        self._layouts = {rung: SlotLayout.of(self._fields(rung, rung == "w4" and rescales_v)) for rung in rungs}

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The rungs that slots can have."""
        return tuple(self._layouts)

    @property
    def reads_w4(self) -> bool:
        """Whether W4 comes from an AWQ checkpoint, and cannot be made from the full precision."""
        return self._awq is not None

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the buffer that every forward shares, the largest need of any linear at any rung."""
        pairs = (zip(self._linears, kernels, strict=True) for kernels in self._kernels.values())
        return max(kernel.scratch_bytes(linear.shape) for pair in pairs for linear, kernel in pair)

    @property
    def staging_bytes(self) -> int:
        """Upper bound of what one `fill` allocates for a while; a pack is read straight into the slot."""
        if isinstance(self._reader, PackedBytes):
            return 0
        widest = max(linear.shape.in_features for linear in self._linears)
        step = max(kernel.row_step for kernels in self._kernels.values() for kernel in kernels)
        chunk = STAGING_BYTES_PER_ELEMENT * max(CHUNK_ELEMENTS, step * widest)
        return chunk + (self._awq.packed_bytes if self._awq is not None else 0)

    def slot_bytes(self, rung: Rung) -> int:
        """Bytes of one layer at `rung`, a multiple of 64."""
        return self._layouts[rung].nbytes

    def layout(self, rung: Rung) -> SlotLayout:
        """How a slot of `rung` is laid out."""
        return self._layouts[rung]

    def kernels(self, rung: Rung) -> Sequence[LinearKernel]:
        """Which kernel serves each linear, in the order of ModelSpec.linears."""
        return self._kernels[rung]

    def kernel_names(self, rung: Rung) -> dict[str, str]:
        """Which kernel serves each linear, for logs."""
        return {line.shape.name: kernel.name for line, kernel in zip(self._linears, self._kernels[rung], strict=True)}

    def fill(self, layer: int, rung: Rung, slot: Tensor, source: LayerWeights | None = None) -> None:
        """Write a layer into a slot.

        `full` is read from the checkpoint straight into the slot. `w8` and `w4` are made from `source`, the
        layer at full precision, or from the checkpoint; the bytes are the same either way. With an AWQ checkpoint
        `w4` is read from that one. From a pack every rung is read as it is, and `source` is not needed.

        Args:
            layer: 0 .. layers - 1.
            rung: one of `rungs`.
            slot: uint8 [>= slot_bytes(rung)].
            source: the same layer at `full`, or None.

        Raises:
            ConfigError: the checkpoint has changed since it was opened.
        """
        if source is not None and (source.layer != layer or source.rung != "full"):
            raise ValueError(f"layer {layer} cannot be made from layer {source.layer} at {source.rung}")
        reader = self._reader
        if isinstance(reader, PackedBytes):
            reader.read_layer(layer, rung, slot[: self.slot_bytes(rung)])
            return
        target = self.bind(layer, rung, slot)
        with torch.inference_mode():
            if rung == "w4" and self._awq is not None:
                self._awq.fill(target, source, CHUNK_ELEMENTS)
                return
            if source is None:
                read_norms(self._spec, reader, layer, target)
            else:
                copy_norms(source, target)
            for i, linear in enumerate(self._linears):
                self._fill_linear(reader, layer, linear, target.linears[i], source.linears[i] if source else None)

    def bind(self, layer: int, rung: Rung, slot: Tensor) -> LayerWeights:
        """Views of a slot as a layer; slot uint8 [>= slot_bytes(rung)]. Reads and writes nothing."""
        views = self._layouts[rung].views(slot)
        bound = []
        for linear, kernel in zip(self._linears, self._kernels[rung], strict=True):
            name = linear.shape.name
            tensors = {spec.name: views[f"{name}.{spec.name}"] for spec in kernel.fields(linear.shape)}
            further = views.get(f"{name}.bias"), views.get(f"{name}.input_scale")
            bound.append(BoundLinear(linear.shape, kernel, tensors, *further))
        qkv, o, gate_up, down = bound
        norms = views["input_norm"], views["post_norm"]
        return LayerWeights(layer, rung, *norms, qkv, o, gate_up, down, views.get("qk_norm"))

    def _fields(self, rung: Rung, scale_o: bool) -> list[FieldSpec]:
        fields = norm_fields(self._spec, self.dtype)
        for linear, kernel in zip(self._linears, self._kernels[rung], strict=True):
            name, shape = linear.shape.name, linear.shape
            if linear.bias:
                fields.append(FieldSpec(f"{name}.bias", (shape.out_features,), self.dtype))
            if name == "o" and scale_o:
                fields.append(FieldSpec(f"{name}.input_scale", (shape.in_features,), self.dtype))
            own = kernel.fields(shape)
            fields.extend(FieldSpec(f"{name}.{spec.name}", spec.shape, spec.dtype) for spec in own)
        return fields

    def _check_layer(self, reader: CheckpointReader, layer: int) -> None:
        check_norms(self._spec, reader, layer)
        for linear in self._linears:
            for part in linear.parts:
                module = part.module.format(layer)
                reader.check(f"{module}.weight", (part.rows, linear.shape.in_features))
                if linear.bias:
                    reader.check(f"{module}.bias", (part.rows,))
                elif f"{module}.bias" in reader:
                    raise ConfigError(f"The checkpoint has a bias '{module}.bias', but config.json says there is none.")

    def _fill_linear(
        self,
        reader: CheckpointReader,
        layer: int,
        linear: FusedLinear,
        target: BoundLinear,
        source: BoundLinear | None,
    ) -> None:
        if target.bias is not None:
            if source is not None and source.bias is not None:
                target.bias.copy_(source.bias)
            else:
                linear.read_rows(reader, layer, "bias", target.bias, 0)
        kernel, shape = target.kernel, linear.shape
        if kernel.rung == "full" and source is None and "weight" in target.tensors:
            linear.read_rows(reader, layer, "weight", target.tensors["weight"], 0)
            return
        step = max(1, CHUNK_ELEMENTS // shape.in_features // kernel.row_step) * kernel.row_step
        staging = torch.empty(0 if source else step, shape.in_features, dtype=self.dtype)
        for first in range(0, shape.out_features, step):
            last = min(first + step, shape.out_features)
            if source is not None:
                rows = source.tensors["weight"][first:last]
            else:
                rows = staging[: last - first]
                linear.read_rows(reader, layer, "weight", rows, first)
            kernel.pack(rows, target.tensors, first)
