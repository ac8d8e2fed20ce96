"""The settings of the engine: one validated tree of dataclasses.

Sources, later ones win: the defaults here, `model.json` of the Triton model, the environment
(`MORPH_*`). Each field has a unit and a docstring; a bad value is a `ConfigError` that names it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from morph_runtime.errors import ConfigError
from morph_runtime.settings_tree import as_plain, build, kind_name, parse
from morph_runtime.slo import parse_classes

MODES = ("accuracy", "balanced", "performance", "off")
DTYPES = ("auto", "bfloat16", "float32")
LOAD_FORMATS = ("auto", "dummy")
RUNGS = ("w8", "w4")
PINS = ("", "full", *RUNGS)
KV_DTYPES = ("auto", "fp8", "int8")
REUSES = ("exact", "at_least", "any")
OVERLAPS = ("auto", "on", "off")
COSTS = ("auto", "off")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and in which numeric type."""

    path: str = ""
    """Folder of a Hugging Face checkpoint (config.json, safetensors, tokenizer.json), or a pack of one."""
    awq_path: str = ""
    """Folder of an AWQ checkpoint of the same model (`morph quantize` makes one): W4 comes from it. Empty: W4 is
    rounded to nearest."""
    dtype: str = "auto"
    """`bfloat16`, `float32`, or `auto`: bfloat16 on every device. float32 is meant for equality tests."""
    load_format: str = "auto"
    """`auto`: the folder's weights; `dummy`: seeded random ones in the shapes of its config.json, for benchmarks (the
    name is vLLM's)."""
    max_model_len: int = 0
    """Tokens of prompt + output per request; 0: the model's limit, lowered to what base KV capacity holds."""
    verify_pack: bool = False
    """Read a whole pack at start and compare its checksums; else sizes, and checksums of its small files only."""
    pack_source: str = ""
    """Folder of the checkpoint that the pack was made from: if it has changed since, the start is refused. Empty: it
    is not looked at."""


@dataclass(frozen=True)
class Defaults:
    """What a device takes for settings that are left open (0).

    Attributes:
        budget_gib: memory budget, GiB; 0: by `kv_tokens`.
        kv_tokens: base KV capacity where there is no budget.
        max_num_seqs: requests that run at the same time.
        max_num_batched_tokens: tokens of one step.
    """

    budget_gib: float
    kv_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class MemorySettings:
    """The memory budget and how it is cut."""

    budget_gib: float = 0.0
    """GiB for weights, KV cache, staging and workspace; 0: weights at full precision + `kv_tokens` of KV cache."""
    kv_tokens: int = 0
    """Tokens of base KV capacity when `budget_gib` is 0; 0: 8,192 on a CPU; on a GPU the budget is nine tenths of its
    memory, as vLLM's is."""
    extent_kib: int = 0
    """KiB per physical extent of the page arena; 0: chosen from the budget."""
    block_tokens: int = 16
    """Tokens per KV block."""
    kv_dtype: str = "auto"
    """What the KV cache stores: `auto`, the type of the activations; `fp8`, float8_e4m3fn without scales (2 times the
    tokens per byte of bfloat16); `int8`, with a scale per token and KV head (1.9 times). Both cost some quality, at
    every level; `fp8` is slow on CPU."""
    prefault: bool = True
    """Fill page tables when pages are mapped (one call) instead of at each first touch."""


@dataclass(frozen=True)
class SchedulerSettings:
    """Limits of continuous batching; names are vLLM's."""

    max_num_seqs: int = 0
    """Requests that run at the same time; 0: 64 on a CPU, 256 on a GPU."""
    max_num_batched_tokens: int = 0
    """Tokens of one step, prefill chunks and decodes together; 0: 512 on a CPU, 2,048 on a GPU."""
    watermark: float = 0.01
    """Share of KV blocks kept free when a request is admitted, so that decodes can go on."""
    line: int = 2
    """Requests that may always wait in the engine for their first step. More may while their prompts fill one step;
    the rest waits in Triton's queue."""
    grammar_cache: int = 64
    """Compiled grammars of structured outputs that are kept for later requests; 0: none."""


@dataclass(frozen=True)
class CacheSettings:
    """The prefix cache: KV blocks that requests have computed serve later ones with the same leading tokens."""

    prefix: bool = True
    """Reuse full KV blocks of equal prefixes; false computes every prompt anew."""
    reuse: str = "at_least"
    """Which blocks a request may take, by the level at which their whole prefix was computed: `exact`, wholly at
    the present level (the output is what it would be without the cache); `at_least`, at this level or milder ones
    (quality is never below that of computing anew; level 0 never reads KV of quantized layers); `any`, at
    whatever level (most hits; after a burst, requests at level 0 may read KV of quantized layers)."""


@dataclass(frozen=True)
class MorphSettings:
    """The controller's targets."""

    mode: str = "balanced"
    """`accuracy`, `balanced`, `performance`, or `off` (level 0 always)."""
    ladder: tuple[str, ...] = ("w4",)
    """Rungs below full precision, from mild to deep; level k walks all layers down the first, then the next."""
    order: str = "auto"
    """Layer order: `auto` (the pack's, else `front_to_back`), `front_to_back`, `back_to_front`, comma-separated layer
    numbers (a permutation), or an order file of `morph profile` (its order for the ladder's deepest rung)."""
    pin: str = ""
    """Serve with every layer at this rung from start to end, the controller asleep whatever the mode: `full`, or a rung
    of the ladder, with the KV capacity of its level. For static baselines. Empty: the controller decides."""
    ttft_slo_s: float = 2.0
    """Seconds from arrival to first token that the controller tries to hold."""
    tpot_slo_s: float = 0.0
    """Seconds per token after the first that it tries to hold; 0: none."""
    slo_classes: tuple[str, ...] = ()
    """Targets of requests that name a class (`slo_class`): entries `name=ttft` or `name=ttft/tpot` in seconds, such as
    `interactive=2/0.1`, `batch=30`. Once there are any, a request that names another class is refused."""
    max_level_share: float = 1.0
    """Share of the levels that may be used, 0 to 1: a cap on degradation beside the mode's own."""
    interval_s: float = 0.05
    """Seconds between decisions."""
    depth: int = 16
    """Layers that may be changing at the same time on a GPU (on a CPU, one)."""
    dwell_s: float = 2.0
    """Seconds for which the pressure must have gone before a level is given back."""
    signal_stale_s: float = 2.0
    """Age in seconds at which the outer queue's signal no longer counts."""
    costs: str = "auto"
    """What steps and shifts cost here: `auto`, measured at the first start with a mode other than `off`, and kept
    in a file; `off`, not known."""
    cost_budget_s: float = 5.0
    """Seconds that measuring them may take, roughly; a slow device gets fewer steps to measure."""
    cost_cache: str = ""
    """Folder of the files; empty: `morphserve/costs` in `XDG_CACHE_HOME`, else in `~/.cache`."""


@dataclass(frozen=True)
class KernelSettings:
    """Which kernel serves which rung; empty means the first that can."""

    full: str = ""
    """Name of the full-precision linear kernel."""
    w8: str = ""
    """Name of the W8 linear kernel."""
    w4: str = ""
    """Name of the W4 linear kernel."""
    graphs: bool = True
    """On a GPU, run steps and quantize layers out of CUDA graphs captured at start; false launches every kernel."""
    threads: int = 0
    """CPU threads of the engine; 0: all cores but one, at least one."""


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine process needs to start."""

    model: ModelSettings = field(default_factory=ModelSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    morph: MorphSettings = field(default_factory=MorphSettings)
    kernels: KernelSettings = field(default_factory=KernelSettings)
    device: str = "cpu"
    """`cpu`, or `cuda`: the first GPU that the process sees."""
    overlap: str = "auto"
    """Schedule the next step while the device runs the present one: `on`, `off`, or `auto`, on for devices that run
    beside the host (not `cpu`)."""
    stats_interval_s: float = 0.2
    """Seconds between statistics snapshots."""
    check_integrity: bool = False
    """Run the integrity check after every step (tests); it always runs when the engine goes idle."""

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched before the one ahead of it is resolved."""
        return self.overlap == "on" or (self.overlap == "auto" and self.device != "cpu")

    def to_json(self) -> str:
        """The tree as JSON; `from_mapping(json.loads(...))` gives it back."""
        return json.dumps(as_plain(self))

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> EngineConfig:
        """Build from nested mappings.

        Raises:
            ConfigError: an unknown key, a wrong type, or a value out of range; the text names the field.
        """
        config = build(EngineConfig, values, "")
        assert isinstance(config, EngineConfig)
        validate(config)
        return config

    def with_environment(self, env: Mapping[str, str] | None = None) -> EngineConfig:
        """This configuration with `MORPH_*` environment values on top.

        Raises:
            ConfigError: a value is not of the field's type or out of range; the text names the variable.
        """
        env = os.environ if env is None else env
        config = self
        for name, (group, key) in ENVIRONMENT.items():
            text = env.get(name, "")
            if text == "":
                continue
            section = getattr(config, group) if group else config
            kind = get_type_hints(type(section))[key]
            try:
                value = parse(kind, text)
            except ValueError:
                raise ConfigError(f"{name} must be {kind_name(kind)}, but is {text!r}.") from None
            changed: dict[str, Any] = {key: value}
            config = replace(config, **({group: replace(section, **changed)} if group else changed))
        validate(config)
        return config


def completed(config: EngineConfig, defaults: Defaults) -> EngineConfig:
    """The settings with nothing left open."""
    memory, scheduler = config.memory, config.scheduler
    if not (memory.budget_gib or memory.kv_tokens):
        memory = replace(memory, budget_gib=defaults.budget_gib, kv_tokens=defaults.kv_tokens)
    seqs, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    scheduler = replace(
        scheduler,
        max_num_seqs=seqs or min(defaults.max_num_seqs, tokens or defaults.max_num_seqs),
        max_num_batched_tokens=tokens or max(defaults.max_num_batched_tokens, seqs),
    )
    return replace(config, memory=memory, scheduler=scheduler)


# Variable -> (section, field); the section of a field of the tree's root is empty.
ENVIRONMENT: Mapping[str, tuple[str, str]] = {
    "MORPH_MODEL": ("model", "path"),
    "MORPH_AWQ": ("model", "awq_path"),
    "MORPH_DTYPE": ("model", "dtype"),
    "MORPH_LOAD_FORMAT": ("model", "load_format"),
    "MORPH_PACK_SOURCE": ("model", "pack_source"),
    "MORPH_MAX_MODEL_LEN": ("model", "max_model_len"),
    "MORPH_MEMORY_BUDGET_GIB": ("memory", "budget_gib"),
    "MORPH_KV_TOKENS": ("memory", "kv_tokens"),
    "MORPH_KV_DTYPE": ("memory", "kv_dtype"),
    "MORPH_MAX_NUM_SEQS": ("scheduler", "max_num_seqs"),
    "MORPH_MAX_NUM_BATCHED_TOKENS": ("scheduler", "max_num_batched_tokens"),
    "MORPH_PREFIX_CACHE": ("cache", "prefix"),
    "MORPH_PREFIX_REUSE": ("cache", "reuse"),
    "MORPH_DEVICE": ("", "device"),
    "MORPH_OVERLAP": ("", "overlap"),
    "MORPH_MODE": ("morph", "mode"),
    "MORPH_LADDER": ("morph", "ladder"),
    "MORPH_ORDER": ("morph", "order"),
    "MORPH_PIN": ("morph", "pin"),
    "MORPH_TTFT_SLO_S": ("morph", "ttft_slo_s"),
    "MORPH_TPOT_SLO_S": ("morph", "tpot_slo_s"),
    "MORPH_SLO_CLASSES": ("morph", "slo_classes"),
    "MORPH_MAX_LEVEL_SHARE": ("morph", "max_level_share"),
    "MORPH_COSTS": ("morph", "costs"),
    "MORPH_COST_CACHE": ("morph", "cost_cache"),
    "MORPH_THREADS": ("kernels", "threads"),
}


def validate(config: EngineConfig) -> None:
    """Check every range.

    Raises:
        ConfigError: the first value that is out of range, with its limits.
    """
    limits: list[tuple[str, float, float, float]] = [
        ("model.max_model_len", config.model.max_model_len, 0, 2**24),
        ("memory.budget_gib", config.memory.budget_gib, 0, 2**20),
        ("memory.kv_tokens", config.memory.kv_tokens or 16, 16, 2**40),
        ("memory.extent_kib", config.memory.extent_kib, 0, 2**20),
        ("memory.block_tokens", config.memory.block_tokens, 1, 1024),
        ("scheduler.max_num_seqs", config.scheduler.max_num_seqs, 0, 65536),
        ("scheduler.max_num_batched_tokens", config.scheduler.max_num_batched_tokens, 0, 2**20),
        ("scheduler.watermark", config.scheduler.watermark, 0, 0.5),
        ("scheduler.line", config.scheduler.line, 1, 65536),
        ("scheduler.grammar_cache", config.scheduler.grammar_cache, 0, 65536),
        ("morph.ttft_slo_s", config.morph.ttft_slo_s, 1e-3, 3600),
        ("morph.tpot_slo_s", config.morph.tpot_slo_s, 0, 3600),
        ("morph.max_level_share", config.morph.max_level_share, 0, 1),
        ("morph.interval_s", config.morph.interval_s, 1e-3, 60),
        ("morph.depth", config.morph.depth, 1, 1024),
        ("morph.dwell_s", config.morph.dwell_s, 0, 3600),
        ("morph.signal_stale_s", config.morph.signal_stale_s, 1e-2, 3600),
        ("morph.cost_budget_s", config.morph.cost_budget_s, 0.1, 600),
        ("kernels.threads", config.kernels.threads, 0, 4096),
        ("stats_interval_s", config.stats_interval_s, 1e-3, 60),
    ]
    for name, value, low, high in limits:
        if not low <= value <= high:  # NaN is in no range
            raise ConfigError(f"{name} must be between {low:.15g} and {high:.15g}, but is {value}.")
    if 0 < config.scheduler.max_num_batched_tokens < config.scheduler.max_num_seqs:
        raise ConfigError(
            f"scheduler.max_num_batched_tokens must be at least scheduler.max_num_seqs "
            f"({config.scheduler.max_num_seqs}), but is {config.scheduler.max_num_batched_tokens}."
        )
    _one_of("memory.kv_dtype", config.memory.kv_dtype, KV_DTYPES)
    _one_of("cache.reuse", config.cache.reuse, REUSES)
    _one_of("morph.mode", config.morph.mode, MODES)
    parse_classes(config.morph.slo_classes, config.morph.ttft_slo_s, config.morph.tpot_slo_s)
    _one_of("morph.costs", config.morph.costs, COSTS)
    _one_of("model.dtype", config.model.dtype, DTYPES)
    _one_of("model.load_format", config.model.load_format, LOAD_FORMATS)
    _one_of("overlap", config.overlap, OVERLAPS)
    _one_of("device", config.device, ("cpu", "cuda"))
    for rung in config.morph.ladder:
        _one_of("morph.ladder", rung, RUNGS)
    if not config.morph.ladder or len(set(config.morph.ladder)) != len(config.morph.ladder):
        raise ConfigError("morph.ladder must name each rung at most once and at least one of: w8, w4.")
    if list(config.morph.ladder) != [r for r in RUNGS if r in config.morph.ladder]:
        raise ConfigError("morph.ladder must go from mild to deep: w8 before w4.")
    _one_of("morph.pin", config.morph.pin, PINS)
    if config.morph.pin not in ("", "full", *config.morph.ladder):
        raise ConfigError(
            f"morph.pin is {config.morph.pin}, which morph.ladder ({','.join(config.morph.ladder)}) does not have: set "
            f"MORPH_LADDER={config.morph.pin} too."
        )
    if config.model.awq_path and "w4" not in config.morph.ladder:
        raise ConfigError("model.awq_path names an AWQ checkpoint, but morph.ladder has no w4 that could use it.")


def with_variables(sentence: str) -> str:
    """An error's sentence, with the environment's name beside the field that it is about: who reads it has set that."""
    for variable, (section, key) in ENVIRONMENT.items():
        name = f"{section}.{key}" if section else key
        place = rf"(?<![\w.]){re.escape(name)}(?![\w.])" if section else rf"^{name}\b"
        if variable not in sentence:
            sentence = re.sub(place, f"{name} ({variable})", sentence, count=1)
    return sentence


def log_level(env: Mapping[str, str]) -> str:
    """The level of the product's own log lines, from `MORPH_LOG_LEVEL`.

    Raises:
        ConfigError: there is no such level.
    """
    level = (env.get("MORPH_LOG_LEVEL") or "WARNING").upper()
    if level not in LOG_LEVELS:
        raise ConfigError(f"MORPH_LOG_LEVEL must be one of {', '.join(LOG_LEVELS)}, but is '{level}'.")
    return level


def resolve_model_folder(path: str) -> Path:
    """The model folder as a path.

    Raises:
        ConfigError: no path was given, or it is not a folder with a config.json.
    """
    if not path:
        raise ConfigError("No model was given: set MORPH_MODEL to the folder of a Hugging Face checkpoint.")
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"The model folder '{path}' does not exist: set MORPH_MODEL to a folder with a config.json.")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"The model folder '{path}' has no config.json: it must be a Hugging Face checkpoint.")
    return folder


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, but is {value!r}.")
