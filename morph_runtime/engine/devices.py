"""What the engine needs of the device that it runs on; `build` puts the parts together, whatever the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from morph_runtime.config import Defaults, EngineConfig
from morph_runtime.engine.opening import OpenModel
from morph_runtime.engine.runner import StepRunner
from morph_runtime.kernels.attention import AttentionShape
from morph_runtime.kernels.kv_format import KVFormat
from morph_runtime.kv import KVCache, KVLayout
from morph_runtime.memory.arena import PageArena
from morph_runtime.memory.fence import DeviceOrder
from morph_runtime.memory.ledger import Ledger
from morph_runtime.morph.filling import LayerFiller
from morph_runtime.morph.swapper import LayerSwapper
from morph_runtime.weights.static import StaticTensors


@dataclass(frozen=True)
class RunnerParts:
    """What a runner works with."""

    config: EngineConfig
    model: OpenModel
    arena: PageArena
    static: StaticTensors
    cache: KVCache
    kv_format: KVFormat
    swapper: LayerSwapper
    max_model_len: int


class EngineDevice(ABC):
    """One device; its methods are called in the order in which they stand here, once each."""

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """What PyTorch calls it."""

    @property
    @abstractmethod
    def order(self) -> DeviceOrder:
        """The order of its steps."""

    @property
    @abstractmethod
    def planes_per_range(self) -> int:
        """Planes of the KV cache that lie in one range, if the number of layers allows (kv.layout)."""

    @property
    @abstractmethod
    def zeroes_kv(self) -> bool:
        """Whether attention reads slots that nothing was written to."""

    def send_pairs(self, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Pairs of numbers as a tensor on the device, int64 [pairs, 2]."""
        return torch.tensor(pairs, device=self.torch_device)

    @abstractmethod
    def serves_kv(self, shape: AttentionShape, kv_format: KVFormat) -> tuple[bool, str]:
        """Whether its attention serves this shape over a cache of this format; the reason when it does not."""

    @property
    @abstractmethod
    def defaults(self) -> Defaults:
        """What it takes for settings that are left open."""

    @abstractmethod
    def extent_sizes(self, budget_bytes: int) -> Sequence[int]:
        """Bytes that an extent may have for a budget, the best first; the settings may say another."""

    @abstractmethod
    def workspace_bytes(
        self, config: EngineConfig, model: OpenModel, layout: KVLayout, kv_format: KVFormat, budget: int
    ) -> int:
        """Upper bound of what the engine takes outside the arena, before anything has been made."""

    @abstractmethod
    def arena(self, ledger: Ledger, config: EngineConfig) -> PageArena:
        """The arena: of the ledger's size, or as much as is certain before `fit`."""

    @abstractmethod
    def fill_static(self, model: OpenModel, slot: torch.Tensor) -> None:
        """Read embedding, final norm and output matrix; slot uint8 [static_bytes] on the device."""

    @abstractmethod
    def filler(self, config: EngineConfig, model: OpenModel) -> LayerFiller:
        """Who fills the layers' slots."""

    @abstractmethod
    def runner(self, parts: RunnerParts) -> StepRunner:
        """Who runs steps; the layers are loaded. Compiles, warms up and captures whatever will be needed."""

    def memory_used_share(self) -> float:
        """Share of the GPU's memory in use, by whomever; -1 where there is none."""
        return -1.0

    @abstractmethod
    def fit(self, ledger: Ledger, arena: PageArena) -> Ledger:
        """Give the arena what the budget leaves now that everything else is there.

        Raises:
            ConfigError: the budget is too small.
        """
