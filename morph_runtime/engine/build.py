"""From settings to a ready engine: read the model, cut the budget, map and fill the memory, wire the parts."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from morph_runtime.config import EngineConfig, resolve_model_folder
from morph_runtime.engine.core import Engine, EngineParts
from morph_runtime.engine.environment import PRIMITIVE_CACHE_BYTES, cpu_threads, engine_variables
from morph_runtime.engine.intake import Intake
from morph_runtime.engine.opening import open_checkpoint, open_pack
from morph_runtime.engine.runner import CpuRunner
from morph_runtime.errors import ConfigError
from morph_runtime.kernels.attention import AttentionShape
from morph_runtime.kernels.attention_cpu import CpuPagedAttention
from morph_runtime.kernels.kv_format import FORMATS, KVFormat
from morph_runtime.kv import BlockPool, KVCache, KVLayout
from morph_runtime.memory.cpu import CpuPageArena
from morph_runtime.memory.fence import CpuOrder
from morph_runtime.memory.ledger import GIB, Ledger, auto_extent_bytes, plan_memory
from morph_runtime.models.decoder import Decoder
from morph_runtime.morph.controller import Controller
from morph_runtime.morph.filling import ThreadFiller
from morph_runtime.morph.resizer import KVResizer
from morph_runtime.morph.shifter import LevelShifter
from morph_runtime.morph.swapper import LayerSwapper
from morph_runtime.pack.manifest import is_pack
from morph_runtime.sampling.sampler import Sampler
from morph_runtime.scheduler import PrefixCache, Scheduler
from morph_runtime.structured.compiler import GrammarCompiler
from morph_runtime.weights.slots import LayerSlots
from morph_runtime.weights.spec import ModelSpec

MIN_CONTEXT = 64
"""Tokens of base KV capacity under which serving makes no sense."""


def build_engine(config: EngineConfig, wake: Callable[[], None] = lambda: None) -> Engine:
    """An engine that is ready to step.

    Args:
        config: validated settings.
        wake: called from another thread when a layer's bytes are ready.

    Raises:
        ConfigError: the model or the budget does not fit; one sentence for the user.
    """
    for name, value in engine_variables(config).items():
        os.environ.setdefault(name, value)
    threads = cpu_threads(config)
    torch.set_num_threads(threads)
    folder = resolve_model_folder(config.model.path)
    model = open_pack(config, folder) if is_pack(folder) else open_checkpoint(config, folder)
    spec, slots, static, plan = model.spec, model.slots, model.static, model.plan
    dtype, rungs = slots.dtype, slots.rungs
    kv_format = FORMATS[config.memory.kv_dtype](dtype)
    layout = _kv_layout(config, spec, kv_format)

    ledger = _cut_budget(config, spec, layout, kv_format, static.static_bytes, slots)
    arena = CpuPageArena(ledger.total_extents, ledger.extent_bytes, config.memory.prefault)
    static_range = arena.reserve("static", static.static_bytes)
    arena.map(static_range, 0, static_range.extents)
    static_slot = arena.tensor(static_range, 0, (static.static_bytes,), torch.uint8)
    static.fill(static_slot)
    order = CpuOrder()
    swapper = LayerSwapper(arena, slots, plan.order, rungs, ThreadFiller(slots), wake)
    swapper.load()

    capacities = tuple(ledger.kv_blocks_at_level(level) for level in range(plan.max_level + 1))
    max_model_len = _max_model_len(config, spec, capacities[0] * config.memory.block_tokens)
    cache = KVCache(arena, layout, max_blocks=max(capacities))
    pool = BlockPool(0)
    prefix = PrefixCache(config.cache, pool, config.memory.block_tokens)
    scheduler = Scheduler(config.scheduler, pool, prefix, config.memory.block_tokens, max_model_len, spec.eos_ids)
    resizer = KVResizer(arena, cache, pool, ledger.staging_extents, scheduler.remap_blocks, order)
    resizer.grow()
    scratch = torch.empty(slots.scratch_bytes, dtype=torch.uint8)
    decoder = Decoder(spec, static.bind(static_slot), cache, scratch, max_model_len, kv_format)
    grammars = GrammarCompiler(
        folder / "tokenizer.json", spec.vocab, spec.eos_ids, config.scheduler.grammar_cache, wake
    )
    return Engine(
        EngineParts(
            config=config,
            spec=spec,
            dtype=dtype,
            kv_format=kv_format,
            ledger=ledger,
            capacities=capacities,
            max_model_len=max_model_len,
            arena=arena,
            cache=cache,
            pool=pool,
            scheduler=scheduler,
            decoder=decoder,
            swapper=swapper,
            resizer=resizer,
            shifter=LevelShifter(plan, swapper, resizer, capacities, order),
            controller=Controller(config.morph, plan.max_level),
            intake=Intake(scheduler, grammars),
            runner=CpuRunner(decoder, swapper, Sampler(spec.eos_ids, torch.device(config.device), threads)),
        )
    )


def _kv_layout(config: EngineConfig, spec: ModelSpec, kv_format: KVFormat) -> KVLayout:
    """Each plane contiguous; with scales beside the elements, which no extent is a multiple of, all planes in one
    range, which keeps the growth quantum small.

    Raises:
        ConfigError: attention cannot serve `memory.kv_dtype` for this model.
    """
    block_tokens = config.memory.block_tokens
    shape = AttentionShape(spec.heads, spec.kv_heads, spec.head_dim, block_tokens, spec.max_positions)
    fits, reason = CpuPagedAttention.can_implement(shape, kv_format)
    if not fits:
        raise ConfigError(
            f"memory.kv_dtype is {config.memory.kv_dtype}, which attention on {config.device} does not serve: {reason}."
        )
    side_bytes = kv_format.side_bytes(block_tokens, spec.kv_heads)
    return KVLayout(
        spec.layers, spec.kv_heads, spec.head_dim, block_tokens, kv_format.element, side_bytes,
        planes_per_range=2 * spec.layers if side_bytes else 1,
    )  # fmt: skip


def _cut_budget(
    config: EngineConfig,
    spec: ModelSpec,
    layout: KVLayout,
    kv_format: KVFormat,
    static_bytes: int,
    slots: LayerSlots,
) -> Ledger:
    """The ledger for these settings; raises ConfigError if the budget is too small."""
    memory = config.memory
    budget = round(memory.budget_gib * GIB)
    slot_bytes: dict[str, int] = {rung: slots.slot_bytes(rung) for rung in slots.rungs}
    size = budget or static_bytes + layout.num_layers * slot_bytes["full"]
    extent_bytes = memory.extent_kib * 1024 or auto_extent_bytes(size)
    return plan_memory(
        budget_bytes=budget,
        kv_tokens=memory.kv_tokens,
        block_tokens=memory.block_tokens,
        extent_bytes=extent_bytes,
        static_bytes=static_bytes,
        slot_bytes=slot_bytes,
        num_layers=layout.num_layers,
        ladder=config.morph.ladder,
        quantum=layout.quantum(extent_bytes),
        min_blocks=-(-max(config.model.max_model_len, MIN_CONTEXT) // memory.block_tokens),
        workspace_bytes=_workspace_bytes(config, spec, layout, kv_format, slots, budget),
    )


def _workspace_bytes(
    config: EngineConfig, spec: ModelSpec, layout: KVLayout, kv_format: KVFormat, slots: LayerSlots, budget: int
) -> int:
    """Upper bound of what a step and a shift allocate outside the arena."""
    block_tokens = config.memory.block_tokens
    kv_tokens = budget // layout.block_bytes * block_tokens if budget else config.memory.kv_tokens
    # No request is longer than base KV capacity, and that is less than a budget of KV blocks alone would hold.
    longest = config.model.max_model_len or max(MIN_CONTEXT, min(spec.max_positions, kv_tokens + block_tokens))
    tokens = config.scheduler.max_num_batched_tokens
    # Logits three times: the scores, their copy that sampling works on, and raw log probabilities.
    logits = 3 * 4 * config.scheduler.max_num_seqs * spec.vocab
    step = Decoder.workspace_for(spec, longest, block_tokens, kv_format, tokens)
    return step + logits + slots.scratch_bytes + slots.staging_bytes + PRIMITIVE_CACHE_BYTES


def _max_model_len(config: EngineConfig, spec: ModelSpec, base_tokens: int) -> int:
    """Tokens per request: what was asked for or the model's limit, within base KV capacity.

    Raises:
        ConfigError: more was asked for than the model or the base KV capacity holds.
    """
    asked = config.model.max_model_len
    if asked > spec.max_positions:
        raise ConfigError(f"model.max_model_len is {asked}, but the model's context is {spec.max_positions} tokens.")
    if asked > base_tokens:
        raise ConfigError(
            f"model.max_model_len is {asked}, but the KV cache at full precision holds {base_tokens} tokens: "
            "raise memory.budget_gib or memory.kv_tokens."
        )
    return asked or min(spec.max_positions, base_tokens)
