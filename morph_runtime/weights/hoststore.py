"""Layers in pinned host memory, from where they are copied to the GPU."""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import Rung
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.slots import LayerSlots


class PinnedStore:
    """One pinned buffer per layer and rung, laid out as its slot on the device is."""

    def __init__(self, slots: Mapping[Rung, LayerSlots], num_layers: int) -> None:
        """Read every layer at some rungs into memory, and pin it.

        Args:
            slots: by rung, `full` among them; they fill the buffers in the device's layout.
            num_layers: of the model.

        Raises:
            ConfigError: a checkpoint that cannot be read, or memory that cannot be pinned.
        """
        self._slots = slots
        self._layers: dict[tuple[int, Rung], Tensor] = {}
        try:
            for rung, filler in slots.items():
                for layer in range(num_layers):
                    slot = _whole_pages(filler.slot_bytes(rung))
                    filler.fill(layer, rung, slot)
                    self._pin(slot)
                    self._layers[layer, rung] = slot
        except BaseException:
            self.close()
            raise

    def find(self, layer: int, rung: Rung) -> Tensor | None:
        """A layer as it lies in its slot, pinned uint8 [slot_bytes]; None if this rung is not kept."""
        slot = self._layers.get((layer, rung))
        return None if slot is None else slot[: self._slots[rung].slot_bytes(rung)]

    def full(self, layer: int) -> LayerWeights:
        """A layer at full precision, in pinned memory."""
        return self._slots["full"].bind(layer, "full", self._layers[layer, "full"])

    def close(self) -> None:
        """Unpin; no copy may be under way."""
        while self._layers:
            _, slot = self._layers.popitem()
            torch.cuda.cudart().cudaHostUnregister(slot.data_ptr())

    def _pin(self, slot: Tensor) -> None:
        # Registered, not allocated pinned: PyTorch's pinned allocator rounds sizes up to powers of two.
        status = int(torch.cuda.cudart().cudaHostRegister(slot.data_ptr(), slot.nbytes, 0))
        if status:
            pinned = sum(kept.nbytes for kept in self._layers.values()) / 2**30
            raise ConfigError(
                f"Host memory for the weights could not be pinned after {pinned:.1f} GiB (CUDA error {status}): raise "
                "the memory or memlock limit of this process."
            )


def _whole_pages(nbytes: int) -> Tensor:
    """Uninitialised bytes, uint8 [nbytes rounded up], that share no page with others: pages are what is pinned."""
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
    first = -room.data_ptr() % mmap.PAGESIZE
    return room[first : first + size]
