"""The layers of a model at every rung, all in memory at the same time, so that any mix can be run at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from morph_runtime.engine.opening import OpenModel
from morph_runtime.kernels.rung import Rung
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.static import StaticTensors

Form = Literal["full", "w8", "w4", "awq"]
"""A rung and where it comes from; `awq` is W4 of an AWQ checkpoint that is measured beside W4 rounded to nearest."""
FORM_RUNG: Mapping[Form, Rung] = {"full": "full", "w8": "w8", "w4": "w4", "awq": "w4"}

Mix = tuple[Form, ...]
"""The form of every layer, by layer number."""


def full_mix(num_layers: int) -> Mix:
    """Every layer at full precision."""
    full: Form = "full"
    return (full,) * num_layers


class LayerStore(ABC):
    """Every layer in every form; takes the memory of all of them."""

    def __init__(self, models: Mapping[Form, OpenModel], say: Callable[[str], None]) -> None:
        """Fill all slots.

        Args:
            models: where each form comes from; `full` is among them.
            say: told what is being done.

        Raises:
            ConfigError: a checkpoint cannot be read.
        """
        self.models = models
        self._layers: dict[tuple[int, Form], LayerWeights] = {}
        count = models["full"].spec.layers
        for number in range(count):
            say(f"reading layer {number + 1} of {count}")
            source = self._fill(number, "full", None)
            self._layers[number, "full"] = source
            for form in models:
                if form != "full":
                    self._layers[number, form] = self._fill(number, form, source)
        self.static = self._fill_static()

    def layer(self, number: int, form: Form) -> LayerWeights:
        """One layer, ready to run."""
        return self._layers[number, form]

    @property
    def scratch_bytes(self) -> int:
        """What a forward needs."""
        return max(model.slots.scratch_bytes for model in self.models.values())

    def slot_bytes(self, form: Form) -> int:
        """Bytes of one layer."""
        return self.models[form].slots.slot_bytes(FORM_RUNG[form])

    @abstractmethod
    def _fill(self, number: int, form: Form, source: LayerWeights | None) -> LayerWeights:
        """Make one layer; `source` is the same at full precision."""

    @abstractmethod
    def _fill_static(self) -> StaticTensors:
        """Embedding, final norm and output matrix."""


class CpuLayerStore(LayerStore):
    """In ordinary memory, which PyTorch aligns to 64 bytes."""

    def _fill(self, number: int, form: Form, source: LayerWeights | None) -> LayerWeights:
        slots, rung = self.models[form].slots, FORM_RUNG[form]
        slot = torch.empty(slots.slot_bytes(rung), dtype=torch.uint8)
        slots.fill(number, rung, slot, source)
        return slots.bind(number, rung, slot)

    def _fill_static(self) -> StaticTensors:
        static = self.models["full"].static
        slot: Tensor = torch.empty(static.static_bytes, dtype=torch.uint8)
        static.fill(slot)
        return static.bind(slot)
