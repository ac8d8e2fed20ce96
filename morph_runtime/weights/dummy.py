"""Seeded random weights in a model's shapes, for benchmarks: nothing but config.json is needed of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import Rung
from morph_runtime.weights.layout import SlotLayout
from morph_runtime.weights.norms import copy_norms
from morph_runtime.weights.packed import PackedBytes
from morph_runtime.weights.slots import CHUNK_ELEMENTS, LayerSlots
from morph_runtime.weights.static import StaticWeights

SPREAD = 0.02


class DummyBytes(PackedBytes):
    """Normal weights of spread 0.02, norms of 1, biases and everything else of 0; a seed per layer.

    They are drawn on the device that serves, so other devices draw others. On the CPU the quantized rungs are made from
    a full-precision layer that is drawn for the purpose, outside the memory budget.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: LayerSlots | None = None
        self._static: SlotLayout | None = None

    def attach(self, slots: LayerSlots, static: StaticWeights) -> None:
        """Tell it the layouts, which are known once it has been given to those that have them."""
        self._slots, self._static = slots, static.layout

    @property
    def from_awq(self) -> bool:
        """No."""
        return False

    def read_layer(self, layer: int, rung: Rung, slot: Tensor) -> None:
        """See `PackedBytes.read_layer`."""
        assert self._slots is not None
        layout = self._slots.layout("full")
        if rung == "full":
            self._draw(layout, slot, layer + 1)
            return
        room = torch.empty(layout.nbytes, dtype=torch.uint8)
        self._draw(layout, room, layer + 1)
        source, target = self._slots.bind(layer, "full", room), self._slots.bind(layer, rung, slot)
        with torch.inference_mode():
            copy_norms(source, target)
            for full, linear in zip(source.linears, target.linears, strict=True):
                if linear.bias is not None and full.bias is not None:
                    linear.bias.copy_(full.bias)
                weight, step = full.tensors["weight"], linear.kernel.row_step
                step *= max(1, CHUNK_ELEMENTS // weight.shape[1] // step)
                for first in range(0, len(weight), step):
                    linear.kernel.pack(weight[first : first + step], linear.tensors, first)

    def read_static(self, slot: Tensor) -> None:
        """See `PackedBytes.read_static`."""
        assert self._static is not None
        self._draw(self._static, slot, 0)

    def _draw(self, layout: SlotLayout, slot: Tensor, seed: int) -> None:
        generator = torch.Generator(self._device).manual_seed(seed)
        for name, view in layout.views(slot).items():
            if name.endswith("norm"):
                view.fill_(1.0)
            elif view.dim() == 2:
                values = torch.empty(view.shape, dtype=view.dtype, device=self._device)
                view.copy_(values.normal_(0.0, SPREAD, generator=generator))
                del values
            else:
                view.zero_()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # a served model leaves nothing in PyTorch's pool; nor must this


def check_no_weights(awq_path: str, pack_source: str) -> None:
    """Refuse settings that name weights.

    Raises:
        ConfigError: one is set.
    """
    for name, value in (("model.awq_path", awq_path), ("model.pack_source", pack_source)):
        if value:
            raise ConfigError(f"model.load_format is dummy, which reads no weights, but {name} is set: unset one.")
