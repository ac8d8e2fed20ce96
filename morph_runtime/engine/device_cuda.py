"""A GPU as the engine's device.

The budget is what NVML shows of this process: context, libraries, workspaces, graphs and arena. All but
the arena are made first, over an arena that just holds the weights; then they are measured, and the arena gets what
is left of the budget.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from morph_runtime.config import Defaults, EngineConfig
from morph_runtime.engine.cuda_attention import StepAttention
from morph_runtime.engine.cuda_graphs import GraphSet
from morph_runtime.engine.cuda_inputs import StepInputs
from morph_runtime.engine.cuda_pieces import StepPieces
from morph_runtime.engine.cuda_runner import CudaRunner
from morph_runtime.engine.cuda_send import PairSender
from morph_runtime.engine.devices import EngineDevice, RunnerParts
from morph_runtime.engine.environment import cpu_threads
from morph_runtime.engine.opening import OpenModel
from morph_runtime.engine.runner import StepRunner
from morph_runtime.errors import ConfigError
from morph_runtime.kernels.attention import AttentionShape
from morph_runtime.kernels.cuda.drawer import CounterDrawer
from morph_runtime.kernels.cuda.toolchain import check_toolchain
from morph_runtime.kernels.kv_format import KVFormat
from morph_runtime.kernels.rung import Rung
from morph_runtime.kv import KVLayout
from morph_runtime.memory.arena import PageArena
from morph_runtime.memory.cuda import CudaPageArena
from morph_runtime.memory.cuda_order import StreamOrder
from morph_runtime.memory.fence import DeviceOrder
from morph_runtime.memory.gpu import GpuMemory
from morph_runtime.memory.ledger import GIB, Ledger
from morph_runtime.models.cuda_decoder import CudaDecoder
from morph_runtime.morph.filling import LayerFiller
from morph_runtime.morph.filling_cuda import StreamFiller
from morph_runtime.sampling.sampler import Sampler
from morph_runtime.weights.hoststore import PinnedStore
from morph_runtime.weights.slots import LayerSlots

EXTENTS = ((16 * GIB, 64 * 2**20), (4 * GIB, 16 * 2**20), (0, 2 * 2**20))
"""Bytes of an extent for budgets from so many bytes on. The driver takes about 25 us to unmap an extent, whatever its
size, so large ones make shifts quick; but the KV cache grows by whole blocks and extents at once, and less than that
may lie idle."""
PLANES_PER_RANGE = 2**16
"""All of them: block-major. Decode reads every layout at the same speed (bench/gpu_kernels, kv_layout), and one range
makes the growth quantum small: one extent where a block's bytes are a power of two."""
OUTSIDE_BYTES = 2 * GIB
"""Upper bound of context, libraries, graphs and PyTorch's pools, apart from what depends on the model."""
MARGIN_BYTES = 64 * 2**20
"""Left free in the budget: what PyTorch's pools may still grow by."""
GPU_SHARE = 0.9
"""Of the GPU's memory, where neither a budget nor KV tokens are set; the default of vLLM's `gpu_memory_utilization`."""
OLDEST = (8, 0)
OLDEST_FP8 = (8, 9)


class CudaDevice(EngineDevice):
    """The first GPU that the process sees."""

    def __init__(self) -> None:
        """Create the CUDA context.

        Raises:
            ConfigError: there is no GPU that can be used, with the reason.
        """
        self._memory = GpuMemory()  # before there is a context
        if not torch.cuda.is_available():
            raise ConfigError(
                "device is cuda, but PyTorch finds no CUDA GPU: check the driver and that torch is a CUDA build, or "
                "set MORPH_DEVICE=cpu."
            )
        self._device = torch.device("cuda", 0)
        capability = torch.cuda.get_device_capability(self._device)
        if capability < OLDEST:
            raise ConfigError(
                f"The GPU is {torch.cuda.get_device_name(self._device)} (SM{capability[0]}{capability[1]}), but SM80 "
                "is the oldest that is served: use a newer one, or set MORPH_DEVICE=cpu."
            )
        check_toolchain()
        torch.cuda.init()
        properties = torch.cuda.get_device_properties(self._device)
        self._memory.check(str(properties.uuid), properties.total_memory)
        # One stream for all steps, current for the engine's thread from here on.
        self._stream = torch.cuda.Stream(self._device, priority=-1)
        torch.cuda.set_stream(self._stream)
        self._order = StreamOrder(self._stream)
        self._is_whole = False
        self._filler: StreamFiller | None = None
        self._pairs = PairSender(self._device)

    @property
    def torch_device(self) -> torch.device:
        """See `EngineDevice.torch_device`."""
        return self._device

    @property
    def order(self) -> DeviceOrder:
        """See `EngineDevice.order`."""
        return self._order

    @property
    def planes_per_range(self) -> int:
        """See `EngineDevice.planes_per_range`."""
        return PLANES_PER_RANGE

    @property
    def zeroes_kv(self) -> bool:
        """The kernels mask what they load."""
        return False

    def send_pairs(self, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """See `EngineDevice.send_pairs`; past the copies of layers."""
        return self._pairs.send(pairs)

    def serves_kv(self, shape: AttentionShape, kv_format: KVFormat) -> tuple[bool, str]:
        """Its kernels read the type of the activations and, where the GPU converts it, float8; no scales."""
        if kv_format.scaled:
            return False, "its kernels read no scales yet: use fp8"
        if kv_format.element == torch.float8_e4m3fn and torch.cuda.get_device_capability(self._device) < OLDEST_FP8:
            return False, "this GPU has no float8, which SM89 and newer have: use auto"
        return True, ""

    @property
    def defaults(self) -> Defaults:
        """Nearly all of the GPU, and steps of the sizes that bench/engine measures."""
        budget = GPU_SHARE * self._memory.total_bytes() / GIB
        return Defaults(budget, kv_tokens=0, max_num_seqs=256, max_num_batched_tokens=2048)

    def extent_sizes(self, budget_bytes: int) -> Sequence[int]:
        """The larger, the cheaper are shifts."""
        return [size for least, size in EXTENTS if budget_bytes >= least]

    def workspace_bytes(
        self, config: EngineConfig, model: OpenModel, layout: KVLayout, kv_format: KVFormat, budget: int
    ) -> int:
        """A bound before anything is measured; `fit` replaces it by what it came to."""
        spec, tokens = model.spec, config.scheduler.max_num_batched_tokens
        most = (2**31 - 1) // max(2 * spec.ffn, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, spec.hidden)
        if tokens > most:
            raise ConfigError(
                f"scheduler.max_num_batched_tokens must be at most {most} on a GPU for a model of this width."
            )
        width = 2 * spec.hidden + 3 * spec.ffn + 2 * (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        logits = 3 * 4 * config.scheduler.max_num_seqs * spec.vocab
        return OUTSIDE_BYTES + 2 * tokens * width + logits + model.slots.scratch_bytes

    def arena(self, ledger: Ledger, config: EngineConfig) -> PageArena:
        """Static weights, layers, staging and the least KV cache; or all of it if no budget is set."""
        total = ledger.total_extents
        self._is_whole = not config.memory.budget_gib
        if not self._is_whole:
            self._check_free(ledger)
            total = min(total, ledger.fixed_extents + ledger.quantum.extents)
        return CudaPageArena(total, ledger.extent_bytes)

    def _check_free(self, ledger: Ledger) -> None:
        """Raises ConfigError if others have so much of the GPU that the budget cannot be had: loading takes minutes."""
        free, whole = torch.cuda.mem_get_info(self._device)
        missing = ledger.budget_bytes - self._memory.used_bytes() - free
        if missing > 0:
            budget, left = ledger.budget_bytes / GIB, (ledger.budget_bytes - missing) / GIB
            raise ConfigError(
                f"memory.budget_gib is {budget:.4g} (nine tenths of the GPU where nothing is set), but other processes "
                f"leave only {left:.4g} of its {whole / GIB:.4g} GiB: end them, or lower it."
            )

    def fill_static(self, model: OpenModel, slot: torch.Tensor) -> None:
        """By way of the host."""
        host = torch.empty(model.static.static_bytes, dtype=torch.uint8)
        model.static.fill(host)
        slot.copy_(host)

    def filler(self, config: EngineConfig, model: OpenModel) -> LayerFiller:
        """Reads and pins the full precision, and the W4 of an AWQ checkpoint."""
        kept: dict[Rung, LayerSlots] = {"full": model.host_slots()}
        if model.slots.reads_w4:
            kept["w4"] = model.slots
        store = PinnedStore(kept, model.spec.layers)
        graphs = GraphSet() if config.kernels.graphs else None
        self._filler = StreamFiller(store, self._stream, config.morph.depth, graphs)
        return self._filler

    def runner(self, parts: RunnerParts) -> StepRunner:
        """Compiles, warms up and captures."""
        config, spec = parts.config, parts.model.spec
        # What loading has left in PyTorch's pool would be carved up by what lives on, and stay.
        torch.cuda.empty_cache()
        sequences, tokens = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
        scratch = torch.empty(parts.model.slots.scratch_bytes, dtype=torch.uint8, device=self._device)
        decoder = CudaDecoder(spec, parts.static, parts.cache, scratch, parts.max_model_len)
        max_blocks = -(-parts.max_model_len // config.memory.block_tokens)
        inputs = StepInputs(tokens, sequences, max_blocks, self._device)
        dtype = parts.model.slots.dtype
        attention = StepAttention(spec, parts.cache, inputs, parts.max_model_len, dtype)
        hidden = torch.zeros(tokens, spec.hidden, dtype=dtype, device=self._device)
        logits = torch.zeros(sequences, spec.vocab, dtype=dtype, device=self._device)
        sampler = Sampler(spec.eos_ids, self._device, cpu_threads(config), CounterDrawer())
        graphs = GraphSet() if config.kernels.graphs else None
        rungs = parts.model.slots.rungs
        pieces = StepPieces(decoder, attention, inputs, hidden, logits)
        runner = CudaRunner(pieces, inputs, parts.swapper, sampler, spec.eos_ids, graphs, len(rungs))
        self._note("before warm-up", parts.arena)
        for rung in rungs:
            with parts.swapper.borrow(0, rung) as layer:
                runner.warm_up(layer)
                torch.cuda.synchronize(self._device)  # the slot is given back
        assert isinstance(parts.arena, CudaPageArena)
        assert self._filler is not None
        self._note("after warm-up", parts.arena)
        with parts.arena.backed():
            runner.capture(self._stream, parts.swapper.bind, rungs)
            self._filler.capture(parts.swapper.bind, spec.layers, rungs)
        torch.cuda.synchronize(self._device)
        self._note("after capture", parts.arena)
        if graphs is not None:  # steps need the graphs' pool alone; what the warm-up left in the other becomes KV cache
            torch.cuda.empty_cache()
        runner.rehearse()
        torch.cuda.synchronize(self._device)
        self._note("when ready", parts.arena)
        return runner

    def memory_used_share(self) -> float:
        """See `EngineDevice.memory_used_share`."""
        return self._memory.used_share()

    def _note(self, when: str, arena: PageArena) -> None:
        """Log what is taken outside the arena."""
        outside = self._memory.used_bytes() - arena.total_extents * arena.extent_bytes
        logging.getLogger(__name__).info(
            "outside the arena %s: %.0f MiB, of which PyTorch holds %.0f and uses %.0f", when, outside / 2**20,
            torch.cuda.memory_reserved(self._device) / 2**20, torch.cuda.memory_allocated(self._device) / 2**20,
        )  # fmt: skip

    def fit(self, ledger: Ledger, arena: PageArena) -> Ledger:
        """See `EngineDevice.fit`."""
        assert isinstance(arena, CudaPageArena)
        measured = self._memory.used_bytes() - arena.total_extents * arena.extent_bytes
        held = torch.cuda.memory_reserved(self._device)
        if not held <= measured <= held + OUTSIDE_BYTES:  # NVML shows all processes together
            logging.getLogger(__name__).warning(
                "other processes seem to have taken or freed memory of this GPU during the start: %.2f GiB are in use "
                "outside the arena, of which PyTorch holds %.2f; the KV cache has what is left of the budget",
                measured / GIB, held / GIB,
            )  # fmt: skip
        outside = max(measured, held) + MARGIN_BYTES
        if self._is_whole:
            return replace(ledger, workspace_bytes=outside)
        fitted = replace(
            ledger, workspace_bytes=outside, total_extents=(ledger.budget_bytes - outside) // ledger.extent_bytes
        )
        if fitted.total_extents < arena.total_extents:
            needed = (arena.total_extents * arena.extent_bytes + outside) / GIB + 0.005
            raise ConfigError(
                f"memory.budget_gib is {ledger.budget_bytes / GIB:.4g}, but this model needs at least {needed:.2f} GiB."
            )
        arena.extend(fitted.total_extents - arena.total_extents)
        return fitted
