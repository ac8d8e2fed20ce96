"""The full-precision layers in pinned host memory, from where an up-shift copies them to the GPU."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.slots import LayerSlots


class PinnedStore:
    """One pinned buffer per layer, laid out as its slot on the device is."""

    def __init__(self, slots: LayerSlots, num_layers: int) -> None:
        """Read every layer at full precision into memory, then pin it.

        Args:
            slots: of the host; its layout of `full` is the device's.
            num_layers: of the model.

        Raises:
            ConfigError: a checkpoint that cannot be read, or memory that cannot be pinned.
        """
        self._slots = slots
        self._layers: list[Tensor] = []
        for layer in range(num_layers):
            slot = _whole_pages(slots.slot_bytes("full"))
            slots.fill(layer, "full", slot)
            self._pin(slot)
            self._layers.append(slot)

    def bytes_of(self, layer: int) -> Tensor:
        """A layer as it lies in its slot, pinned uint8 [slot_bytes]."""
        return self._layers[layer][: self._slots.slot_bytes("full")]

    def bind(self, layer: int) -> LayerWeights:
        """The same, as a layer."""
        return self._slots.bind(layer, "full", self._layers[layer])

    def close(self) -> None:
        """Unpin; no copy may be under way."""
        while self._layers:
            torch.cuda.cudart().cudaHostUnregister(self._layers.pop().data_ptr())

    def _pin(self, slot: Tensor) -> None:
        # Registered, not allocated pinned: PyTorch's pinned allocator rounds sizes up to powers of two.
        status = int(torch.cuda.cudart().cudaHostRegister(slot.data_ptr(), slot.nbytes, 0))
        if status:
            pinned = len(self._layers) * slot.nbytes / 2**30
            self.close()
            raise ConfigError(
                f"Host memory for the full-precision weights could not be pinned after {pinned:.1f} GiB (CUDA error "
                f"{status}): raise the memory or memlock limit of this process."
            )


def _whole_pages(nbytes: int) -> Tensor:
    """Uninitialised bytes, uint8 [nbytes rounded up], that share no page with others: pages are what is pinned."""
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
    first = -room.data_ptr() % mmap.PAGESIZE
    return room[first : first + size]
