"""The CPU as the engine's device: memory of this process, kernels on the calling thread."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from morph_runtime.config import Defaults, EngineConfig
from morph_runtime.engine.devices import EngineDevice, RunnerParts
from morph_runtime.engine.environment import PRIMITIVE_CACHE_BYTES, cpu_threads
from morph_runtime.engine.opening import OpenModel
from morph_runtime.engine.runner import CpuRunner, StepRunner
from morph_runtime.kernels.attention import AttentionShape
from morph_runtime.kernels.attention_cpu import CpuPagedAttention
from morph_runtime.kernels.kv_format import KVFormat
from morph_runtime.kv import KVLayout
from morph_runtime.kv.cache import CHUNK_BYTES
from morph_runtime.memory.arena import PageArena
from morph_runtime.memory.cpu import CpuPageArena
from morph_runtime.memory.fence import CpuOrder, DeviceOrder
from morph_runtime.memory.ledger import MIN_CONTEXT, Ledger, auto_extent_bytes
from morph_runtime.models.decoder import Decoder
from morph_runtime.morph.filling import LayerFiller, ThreadFiller
from morph_runtime.sampling.sampler import Sampler
from morph_runtime.sampling.sampler import workspace_bytes as sampling_bytes

DEFAULTS = Defaults(budget_gib=0, kv_tokens=8192, max_num_seqs=64, max_num_batched_tokens=512)
"""Little memory: a machine's is not the server's alone."""


class CpuDevice(EngineDevice):
    """Layer-major KV: each layer's attention reads one contiguous tensor."""

    def __init__(self) -> None:
        self._order = CpuOrder()

    @property
    def torch_device(self) -> torch.device:
        """See `EngineDevice.torch_device`."""
        return torch.device("cpu")

    @property
    def order(self) -> DeviceOrder:
        """See `EngineDevice.order`."""
        return self._order

    @property
    def planes_per_range(self) -> int:
        """One."""
        return 1

    @property
    def zeroes_kv(self) -> bool:
        """It gathers whole blocks."""
        return True

    def serves_kv(self, shape: AttentionShape, kv_format: KVFormat) -> tuple[bool, str]:
        """See `CpuPagedAttention.can_implement`."""
        return CpuPagedAttention.can_implement(shape, kv_format)

    @property
    def defaults(self) -> Defaults:
        """See `EngineDevice.defaults`."""
        return DEFAULTS

    def extent_sizes(self, budget_bytes: int) -> Sequence[int]:
        """See `auto_extent_bytes`."""
        return (auto_extent_bytes(budget_bytes),)

    def workspace_bytes(
        self, config: EngineConfig, model: OpenModel, layout: KVLayout, kv_format: KVFormat, budget: int
    ) -> int:
        """Upper bound of what a step and a shift allocate outside the arena."""
        spec, slots = model.spec, model.slots
        block_tokens = config.memory.block_tokens
        kv_tokens = budget // layout.block_bytes * block_tokens if budget else config.memory.kv_tokens
        # No request is longer than base KV capacity, and that is less than a budget of KV blocks alone would hold.
        longest = config.model.max_model_len or max(MIN_CONTEXT, min(spec.max_positions, kv_tokens + block_tokens))
        tokens = config.scheduler.max_num_batched_tokens
        logits = sampling_bytes(config.scheduler.max_num_seqs, spec.vocab, self.torch_device)
        step = Decoder.workspace_for(spec, longest, block_tokens, kv_format, tokens)
        # Blocks are copied between steps, when a step's own memory is free, and make room for at most one layer.
        copies = min(max(CHUNK_BYTES, layout.range_block_bytes), slots.slot_bytes("full"))
        return max(step + logits, copies) + slots.scratch_bytes + slots.staging_bytes + PRIMITIVE_CACHE_BYTES

    def arena(self, ledger: Ledger, config: EngineConfig) -> PageArena:
        """All of it at once."""
        return CpuPageArena(ledger.total_extents, ledger.extent_bytes, config.memory.prefault)

    def fill_static(self, model: OpenModel, slot: torch.Tensor) -> None:
        """Straight into the slot."""
        model.static.fill(slot)

    def filler(self, config: EngineConfig, model: OpenModel) -> LayerFiller:
        """A thread."""
        return ThreadFiller(model.slots)

    def runner(self, parts: RunnerParts) -> StepRunner:
        """Nothing is captured or compiled."""
        spec = parts.model.spec
        scratch = torch.empty(parts.model.slots.scratch_bytes, dtype=torch.uint8)
        decoder = Decoder(spec, parts.static, parts.cache, scratch, parts.max_model_len, parts.kv_format)
        return CpuRunner(decoder, parts.swapper, Sampler(spec.eos_ids, self.torch_device, cpu_threads(parts.config)))

    def fit(self, ledger: Ledger, arena: PageArena) -> Ledger:
        """The upper bound was counted before."""
        return ledger
