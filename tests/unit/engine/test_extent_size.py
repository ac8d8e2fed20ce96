"""Extents are as large as they may be, but the KV cache of any model grows in steps that waste little."""

from __future__ import annotations

import pytest
import torch

from morph_runtime.engine.build import COARSEST, _extent_bytes
from morph_runtime.kv import KVLayout
from morph_runtime.memory.ledger import GIB

MIB = 2**20
SIZES = (64 * MIB, 16 * MIB, 2 * MIB)


def layout(layers: int, kv_heads: int) -> KVLayout:
    return KVLayout(layers, kv_heads, 128, 16, torch.bfloat16, 0, 2 * layers)


@pytest.mark.parametrize(
    ("name", "layers", "kv_heads", "budget_gib", "extent_mib"),
    [
        ("Llama-3-8B", 32, 8, 24, 64),
        ("Llama-2-7B", 32, 32, 24, 64),
        ("Qwen3-8B", 36, 8, 24, 64),
        ("Llama-2-13B", 40, 40, 40, 16),
        ("Vicuna-33B", 60, 52, 72, 2),
    ],
)
def test_the_size_goes_by_how_the_kv_cache_would_grow(
    name: str, layers: int, kv_heads: int, budget_gib: int, extent_mib: int
) -> None:
    kv = layout(layers, kv_heads)
    size = _extent_bytes(SIZES, kv, budget_gib * GIB)
    assert size == extent_mib * MIB, name
    growth = kv.quantum(size).extents * size
    assert growth * COARSEST <= budget_gib * GIB or size == SIZES[-1]


def test_where_no_size_is_fine_enough_the_finest_growth_is_taken() -> None:
    kv = layout(60, 52)
    size = _extent_bytes(SIZES, kv, GIB)
    assert kv.quantum(size).extents * size == min(kv.quantum(s).extents * s for s in SIZES)
