"""From settings to a ready engine: read the model, cut the budget, map and fill the memory, wire the parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module

import torch

from morph_runtime.config import EngineConfig, completed, resolve_model_folder
from morph_runtime.costs.start import find_costs
from morph_runtime.engine.core import Engine, EngineParts
from morph_runtime.engine.devices import EngineDevice, RunnerParts
from morph_runtime.engine.environment import cpu_threads, engine_variables
from morph_runtime.engine.intake import Intake
from morph_runtime.engine.opening import OpenModel, open_checkpoint, open_dummy, open_pack
from morph_runtime.errors import ConfigError
from morph_runtime.kernels.attention import AttentionShape
from morph_runtime.kernels.kv_format import FORMATS, KVFormat
from morph_runtime.kv import BlockPool, KVCache, KVLayout
from morph_runtime.memory.ledger import GIB, MIN_CONTEXT, Ledger, plan_memory
from morph_runtime.morph.controller import Controller
from morph_runtime.morph.levels import LevelPlan
from morph_runtime.morph.resizer import KVResizer
from morph_runtime.morph.shifter import LevelShifter
from morph_runtime.morph.swapper import LayerSwapper
from morph_runtime.pack.manifest import is_pack
from morph_runtime.scheduler import PrefixCache, Scheduler
from morph_runtime.structured.compiler import GrammarCompiler
from morph_runtime.weights.spec import ModelSpec

COARSEST = 32
"""The KV cache grows by at most one part in so many of the budget, where smaller extents can do it: if a block's bytes
are no power of two, what is whole blocks and whole large extents at once may be gigabytes, which would lie idle."""
CUDA_PACKAGES = {"triton": "triton", "cuda-bindings": "cuda.bindings.driver", "nvidia-ml-py": "pynvml"}
"""What a GPU needs besides PyTorch: distribution and top-level module."""


@dataclass(frozen=True)
class EnginePlan:
    """An engine before any memory is taken; on a GPU `ledger` is a first estimate, measured anew when all is built."""

    config: EngineConfig
    """With what the settings left open to the device."""
    device: EngineDevice
    model: OpenModel
    kv_format: KVFormat
    layout: KVLayout
    ledger: Ledger
    max_model_len: int
    """Tokens, prompt and output."""


def _importable(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def open_model(config: EngineConfig, device: torch.device) -> OpenModel:
    """The model that the settings name.

    Raises:
        ConfigError: it cannot be served; the text says why.
    """
    folder = resolve_model_folder(config.model.path)
    if config.model.load_format == "dummy":
        return open_dummy(config, folder, device)
    return open_pack(config, folder, device) if is_pack(folder) else open_checkpoint(config, folder, device)


def build_engine(config: EngineConfig, wake: Callable[[], None] = lambda: None) -> Engine:
    """An engine that is ready to step.

    Args:
        config: validated settings.
        wake: called from another thread when a layer's bytes are ready, or its memory.

    Raises:
        ConfigError: the model, the device or the budget does not fit; one sentence for the user.
    """
    with ExitStack() as undo:  # gives memory and threads back if it raises half-way
        parts, plan = _assemble(config, wake, undo)
        if config.morph.pin:  # nothing is ever decided, so nothing needs to be predicted
            engine = Engine(parts)
            engine.set_level(plan.level_of(config.morph.pin))
        else:
            costs = find_costs(parts, plan, resolve_model_folder(config.model.path))
            if costs is not None:
                parts.controller.use_costs(costs, parts.config.scheduler.max_num_batched_tokens)
            engine = Engine(replace(parts, costs=costs))
        undo.pop_all()
    return engine


def build_parts(config: EngineConfig, wake: Callable[[], None] = lambda: None) -> tuple[EngineParts, LevelPlan]:
    """The parts of an engine, without its costs, and its levels; arguments and errors as of `build_engine`."""
    with ExitStack() as undo:
        parts = _assemble(config, wake, undo)
        undo.pop_all()
    return parts


def _assemble(config: EngineConfig, wake: Callable[[], None], undo: ExitStack) -> tuple[EngineParts, LevelPlan]:
    for name, value in engine_variables(config).items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(cpu_threads(config))
    folder = resolve_model_folder(config.model.path)
    planned = plan_engine(config)
    config = planned.config
    device, model, kv_format, layout = planned.device, planned.model, planned.kv_format, planned.layout
    ledger, max_model_len = planned.ledger, planned.max_model_len
    spec, slots, static, plan = model.spec, model.slots, model.static, model.plan
    block_tokens = config.memory.block_tokens
    arena = device.arena(ledger, config)
    undo.callback(arena.close)
    arena.on_move = wake
    static_range = arena.reserve("static", static.static_bytes)
    arena.map(static_range, 0, static_range.extents).finish()
    static_slot = arena.tensor(static_range, 0, (static.static_bytes,), torch.uint8)
    device.fill_static(model, static_slot)
    filler = device.filler(config, model)
    undo.callback(filler.close)
    swapper = LayerSwapper(arena, slots, plan.order, slots.rungs, filler, wake)
    swapper.load()
    bound = replace(ledger, total_extents=ledger.budget_bytes // ledger.extent_bytes)  # as if all were arena
    cache = KVCache(arena, layout, bound.kv_blocks_at_level(plan.max_level), device.zeroes_kv, device.send_pairs)
    cache.grow(1)
    runner = device.runner(
        RunnerParts(config, model, arena, static.bind(static_slot), cache, kv_format, swapper, max_model_len)
    )
    undo.callback(runner.close)

    ledger = device.fit(ledger, arena)
    capacities = tuple(ledger.kv_blocks_at_level(level) for level in range(plan.max_level + 1))
    if capacities[0] * block_tokens < max_model_len:
        raise ConfigError(
            f"memory.budget_gib holds {capacities[0] * block_tokens} tokens of KV cache at full precision, but one "
            f"request may have {max_model_len}: raise it, or set model.max_model_len."
        )
    pool = BlockPool(cache.mapped_blocks)
    prefix = PrefixCache(config.cache, pool, block_tokens)
    scheduler = Scheduler(config.scheduler, pool, prefix, block_tokens, max_model_len, spec.eos_ids)
    resizer = KVResizer(
        arena, cache, pool, ledger.staging_extents, scheduler.remap_blocks, lambda: scheduler.num_running, device.order
    )
    resizer.grow(capacities[0])
    resizer.publish(wait=True)
    grammars = GrammarCompiler(
        folder / "tokenizer.json", spec.vocab, spec.eos_ids, config.scheduler.grammar_cache, wake
    )
    parts = EngineParts(
        config=config,
        spec=spec,
        dtype=slots.dtype,
        kv_format=kv_format,
        ledger=ledger,
        capacities=capacities,
        max_model_len=max_model_len,
        arena=arena,
        cache=cache,
        pool=pool,
        scheduler=scheduler,
        swapper=swapper,
        resizer=resizer,
        shifter=LevelShifter(plan, swapper, resizer, capacities, device.order),
        controller=Controller(config.morph, plan.max_level),
        intake=Intake(scheduler, grammars, share_prompts=config.cache.prefix),
        runner=runner,
        order=device.order,
        gpu_used_share=device.memory_used_share,
    )
    return parts, plan


def plan_engine(config: EngineConfig) -> EnginePlan:
    """What an engine would be made of: the model is opened and the budget cut, but no memory taken.

    Raises:
        ConfigError: the model, the device or the budget does not fit; one sentence for the user.
    """
    device = open_device(config)
    config = completed(config, device.defaults)
    model = open_model(config, device.torch_device)
    check_context(config, model.spec)
    kv_format = FORMATS[config.memory.kv_dtype](model.slots.dtype)
    layout = _kv_layout(config, model.spec, kv_format, device)
    ledger = _cut_budget(config, model, layout, kv_format, device)
    max_model_len = _max_model_len(config, model.spec, ledger.kv_blocks_at_level(0) * config.memory.block_tokens)
    return EnginePlan(config, device, model, kv_format, layout, ledger, max_model_len)


def check_context(config: EngineConfig, spec: ModelSpec) -> None:
    """Raises ConfigError if a longer context is asked for than the model has."""
    asked = config.model.max_model_len
    if asked > spec.longest_context:
        raise ConfigError(
            f"model.max_model_len is {asked}, but the model's context is {spec.longest_context} tokens: lower it."
        )


def open_device(config: EngineConfig) -> EngineDevice:
    """The device that the settings name. What only a GPU needs is imported when one is asked for.

    Raises:
        ConfigError: it cannot be used; the text says why and what to do.
    """
    if config.device == "cpu":
        from morph_runtime.engine.device_cpu import CpuDevice

        return CpuDevice()
    missing = [name for name, module in CUDA_PACKAGES.items() if not _importable(module)]
    if missing:
        raise ConfigError(
            f"device is cuda, but {', '.join(missing)} cannot be imported: install morphserve[cuda], or set "
            "MORPH_DEVICE=cpu."
        )
    from morph_runtime.engine.device_cuda import CudaDevice

    return CudaDevice()


def _kv_layout(config: EngineConfig, spec: ModelSpec, kv_format: KVFormat, device: EngineDevice) -> KVLayout:
    """As many planes to a range as the device likes; with scales beside the elements, which no extent is a multiple
    of, all planes in one, which keeps the growth quantum small.

    Raises:
        ConfigError: the device's attention cannot serve `memory.kv_dtype` for this model.
    """
    block_tokens = config.memory.block_tokens
    longest = config.model.max_model_len or spec.max_positions
    shape = AttentionShape(spec.heads, spec.kv_heads, spec.head_dim, block_tokens, longest)
    fits, reason = device.serves_kv(shape, kv_format)
    if not fits:
        raise ConfigError(
            f"memory.kv_dtype is {config.memory.kv_dtype}, which attention on {config.device} does not serve: {reason}."
        )
    side_bytes = kv_format.side_bytes(block_tokens, spec.kv_heads)
    planes = KVLayout.divisor(spec.layers, 2 * spec.layers if side_bytes else device.planes_per_range)
    return KVLayout(spec.layers, spec.kv_heads, spec.head_dim, block_tokens, kv_format.element, side_bytes, planes)


def _cut_budget(
    config: EngineConfig, model: OpenModel, layout: KVLayout, kv_format: KVFormat, device: EngineDevice
) -> Ledger:
    """The ledger for these settings; raises ConfigError if the budget is too small."""
    memory, slots = config.memory, model.slots
    budget = round(memory.budget_gib * GIB)
    slot_bytes: dict[str, int] = {rung: slots.slot_bytes(rung) for rung in slots.rungs}
    size = budget or model.static.static_bytes + layout.num_layers * slot_bytes["full"]
    extent_bytes = memory.extent_kib * 1024 or _extent_bytes(device.extent_sizes(size), layout, size)
    return plan_memory(
        budget_bytes=budget,
        kv_tokens=memory.kv_tokens,
        block_tokens=memory.block_tokens,
        extent_bytes=extent_bytes,
        static_bytes=model.static.static_bytes,
        slot_bytes=slot_bytes,
        num_layers=layout.num_layers,
        ladder=config.morph.ladder,
        quantum=layout.quantum(extent_bytes),
        min_blocks=-(-max(config.model.max_model_len, MIN_CONTEXT) // memory.block_tokens),
        workspace_bytes=device.workspace_bytes(config, model, layout, kv_format, budget),
    )


def _extent_bytes(sizes: Sequence[int], layout: KVLayout, budget_bytes: int) -> int:
    """The first size at which the KV cache grows by little enough, else that at which it grows by the least."""
    growth = {size: layout.quantum(size).extents * size for size in sizes}
    least = min(growth.values())
    return next(size for size in sizes if growth[size] <= max(budget_bytes // COARSEST, least))


def _max_model_len(config: EngineConfig, spec: ModelSpec, base_tokens: int) -> int:
    """Tokens per request: what was asked for or `max_positions` of the model, within base KV capacity.

    Raises:
        ConfigError: more was asked for than the base KV capacity holds.
    """
    asked = config.model.max_model_len
    if asked > base_tokens:
        raise ConfigError(
            f"model.max_model_len is {asked}, but the KV cache at full precision holds {base_tokens} tokens: "
            "raise memory.budget_gib or memory.kv_tokens."
        )
    return asked or min(spec.max_positions, base_tokens)
