"""A quantized KV cache under all that an engine does to blocks: growth, migration, sharing, changes of level."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from engine.conftest import run_all, submit
from engine.test_oracle import Ledger, Moved, Ran, record, scripted_levels
from morph_runtime.config import EngineConfig
from morph_runtime.errors import ConfigError
from morph_runtime.kernels.attention_cpu import CpuPagedAttention
from morph_runtime.pack.make import make_pack
from tests.oracle import oracle_for

if TYPE_CHECKING:
    from engine.conftest import EngineFactory


def fp8(values: torch.Tensor) -> torch.Tensor:
    """To the nearest of the numbers of e4m3, by a search among all of them."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    upper = torch.bucketize(values.abs(), numbers).clamp(1, len(numbers) - 1)
    below, above = numbers[upper - 1], numbers[upper]
    return torch.where(values.abs() - below < above - values.abs(), below, above) * values.sign()


def int8(values: torch.Tensor) -> torch.Tensor:
    """255 even steps between minus and plus the largest number of each head."""
    step = values.abs().max(dim=-1, keepdim=True).values / 127
    return torch.floor(values / step + 0.5) * step


STORED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"fp8": fp8, "int8": int8}
USUAL, MOST, LARGEST = 2e-3, 2e-2, 0.15
"""On logits of magnitude ~10. Where float32 rounding carries a number over the middle between two stored ones, all
that comes after differs by a step of the format: seldom, and far less than what the format itself changes."""


@pytest.mark.parametrize("kv", STORED)
def test_logits_equal_a_reference_that_stores_the_same_way_while_levels_change_and_prefixes_are_shared(
    tiny_model: Path, engines: EngineFactory, kv: str
) -> None:
    engine = engines(
        tiny_model, morph={"order": "2,0,3,1", "ladder": ["w8", "w4"]}, memory={"kv_tokens": 384, "kv_dtype": kv}
    )
    oracle, unquantized = oracle_for(engine, tiny_model, STORED[kv]), oracle_for(engine, tiny_model)
    log: list[Ran | Moved] = []
    record(engine, log)
    rng = random.Random(6)
    stems = [[rng.randrange(1, 200) for _ in range(60)] for _ in range(2)]
    for key in range(24):
        submit(engine, key, [*rng.choice(stems)[: rng.choice([20, 60])], *[rng.randrange(1, 200)] * (key % 9 + 1)], 24)
    run_all(engine, scripted_levels(engine))
    errors: dict[str, list[float]] = {"same": [], "unquantized": []}
    block_tokens = engine.parts.config.memory.block_tokens
    for name, reference in (("same", oracle), ("unquantized", unquantized)):
        ledger = Ledger(reference, block_tokens, "at_least")
        for entry in log:
            if isinstance(entry, Moved):
                ledger.move(entry)
                continue
            expected = ledger.replay(entry)
            if entry.logits is not None:
                errors[name].append(float((entry.logits - expected).abs().max()))
            if name == "unquantized" and len(errors[name]) == 150:  # enough to tell them apart
                break
        assert ledger.reused > 200 or name == "unquantized", "the test must share"
    assert len(errors["same"]) == 24 * 24
    assert engine.parts.resizer.blocks_migrated > 0, "the test must migrate"
    same, unlike = torch.tensor(errors["same"]), torch.tensor(errors["unquantized"])
    assert same.median() < USUAL
    assert same.quantile(0.9) < MOST
    assert same.max() < LARGEST
    assert unlike.median() > 20 * same.median(), "a reference that stores everything exactly must be told apart"


@pytest.mark.parametrize("kv", STORED)
def test_a_request_says_the_same_alone_and_among_others_but_for_near_ties(
    tiny_model: Path, engines: EngineFactory, kv: str
) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(1, 200) for _ in range(rng.randint(1, 80))] for _ in range(16)]
    engine = engines(tiny_model, memory={"kv_tokens": 512, "kv_dtype": kv}, cache={"prefix": False})

    def run(keys: range) -> dict[int, list[tuple[int, float]]]:
        """Tokens of each request, each with the gap between the two likeliest."""
        said: dict[int, list[tuple[int, float]]] = {key: [] for key in keys}
        for key in keys:
            submit(engine, key, prompts[key], 40, logprobs=2)
        while engine.has_requests:
            out = engine.step(decide=False)
            for delta in out.tokens if out else ():
                gap = delta.logprobs[0].values[1] - delta.logprobs[0].values[2]
                said[delta.key].append((delta.tokens[0], gap))
        return said

    together = run(range(16))
    differing = 0
    for key in range(16):
        alone = run(range(key, key + 1))[key]
        assert len(alone) == len(together[key]) == 40
        for (token, gap), (other, _) in zip(alone, together[key], strict=True):
            if token != other:
                assert gap < 2 * LARGEST
                differing += 1
                break
    assert differing <= 4


@pytest.mark.parametrize("kv,least", [("fp8", 1.95), ("int8", 1.7)])
def test_the_same_budget_holds_more_tokens_at_every_level(
    tiny_model: Path, engines: EngineFactory, kv: str, least: float
) -> None:
    """int8 keeps 4 bytes of scale for each 32 numbers here: 1.78 times the tokens, before rounding to quanta."""
    sections = {"model": {"dtype": "bfloat16"}, "morph": {"ladder": ["w8", "w4"]}}
    plain = engines(tiny_model, **sections, memory={"budget_gib": 0.1}).parts
    small = engines(tiny_model, **sections, memory={"budget_gib": 0.1, "kv_dtype": kv}).parts
    assert small.ledger.budget_bytes <= plain.ledger.budget_bytes
    for level in range(len(plain.capacities)):
        assert small.capacities[level] / plain.capacities[level] > least
    for parts in (plain, small):
        assert parts.cache.mapped_blocks * parts.cache.layout.block_bytes <= parts.ledger.arena_bytes


@pytest.mark.parametrize("kv", STORED)
def test_a_pack_serves_any_type_since_it_holds_weights_alone(
    tiny_model: Path, engines: EngineFactory, tmp_path: Path, kv: str
) -> None:
    make_pack(EngineConfig.from_mapping({"model": {"path": str(tiny_model), "dtype": "float32"}}), tmp_path / "pack")
    tokens = []
    for folder in (tiny_model, tmp_path / "pack"):
        engine = engines(folder, memory={"kv_dtype": kv})
        submit(engine, 1, [1, 5, 9] * 20, 30)
        tokens.append(run_all(engine))
    assert tokens[0] == tokens[1]


def test_what_the_cache_stores_is_told_to_who_asks(tiny_model: Path, engines: EngineFactory) -> None:
    told = [
        engines(tiny_model, model={"dtype": dtype}, memory={"kv_dtype": kv}).info(0).kv_dtype
        for dtype, kv in (("bfloat16", "auto"), ("float32", "auto"), ("bfloat16", "fp8"), ("bfloat16", "int8"))
    ]
    assert told == ["bfloat16", "float32", "fp8", "int8"]


def test_a_type_that_attention_does_not_serve_is_refused_with_its_reason(
    tiny_model: Path, engines: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuPagedAttention, "can_implement", lambda shape, kv_format: (False, "it cannot"))
    with pytest.raises(ConfigError, match="is int8, which attention on cpu does not serve: it cannot"):
        engines(tiny_model, memory={"kv_dtype": "int8"})
