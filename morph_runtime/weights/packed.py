"""Slot bytes that were prepared before: what the layouts of this room need of a pack."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from morph_runtime.kernels.rung import Rung


class PackedBytes(ABC):
    """The slots of one model, ready to be read. Threads may read at the same time.

    Whether the bytes fit this machine's kernels and layouts is checked before the first read, by the implementer.
    """

    @property
    @abstractmethod
    def from_awq(self) -> bool:
        """Whether the W4 slots come from an AWQ checkpoint."""

    @abstractmethod
    def read_layer(self, layer: int, rung: Rung, slot: Tensor) -> None:
        """Read a layer; slot uint8 [slot_bytes(rung)].

        Raises:
            ConfigError: a file cannot be read to its end; it has changed since it was opened.
        """

    @abstractmethod
    def read_static(self, slot: Tensor) -> None:
        """Read the static weights; slot uint8 [static_bytes].

        Raises:
            ConfigError: as `read_layer`.
        """
