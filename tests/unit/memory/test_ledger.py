"""The ledger spends the whole budget and never more, at every level."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from morph_runtime.errors import ConfigError
from morph_runtime.memory.ledger import (
    GIB,
    MAX_EXTENT_BYTES,
    MAX_EXTENTS,
    MIN_EXTENT_BYTES,
    KVQuantum,
    Ledger,
    auto_extent_bytes,
    plan_memory,
)

EXTENT = 16 * 1024


def plan(budget_bytes: int, ladder: tuple[str, ...] = ("w4",), **changes: object) -> Ledger:
    values: dict[str, object] = {
        "budget_bytes": budget_bytes, "kv_tokens": 512, "block_tokens": 16, "extent_bytes": EXTENT,
        "static_bytes": 5 * EXTENT, "slot_bytes": {"full": 20 * EXTENT, "w8": 11 * EXTENT, "w4": 6 * EXTENT},
        "num_layers": 4, "ladder": ladder, "quantum": KVQuantum(2, 8), "min_blocks": 4, **changes,
    }  # fmt: skip
    return plan_memory(**values)  # type: ignore[arg-type]


@given(
    budget=st.integers(0, 400), static=st.integers(1, 40), full=st.integers(4, 60), w8=st.integers(1, 40),
    w4=st.integers(1, 30), layers=st.integers(1, 6), blocks=st.integers(1, 5), cost=st.integers(1, 30),
    ladder=st.sampled_from([("w4",), ("w8",), ("w8", "w4")]),
)  # fmt: skip
def test_weights_staging_and_kv_fit_the_budget_at_every_level_and_less_than_a_quantum_idles(
    budget: int, static: int, full: int, w8: int, w4: int, layers: int, blocks: int, cost: int, ladder: tuple[str, ...]
) -> None:
    assume(w4 < w8 < full)
    try:
        ledger = plan(
            budget * EXTENT, ladder, static_bytes=static * EXTENT, num_layers=layers,
            slot_bytes={"full": full * EXTENT, "w8": w8 * EXTENT, "w4": w4 * EXTENT}, quantum=KVQuantum(blocks, cost),
        )  # fmt: skip
    except ConfigError:
        return
    capacities = []
    for level in range(ledger.max_level + 1):
        kv_blocks = ledger.kv_blocks_at_level(level)
        capacities.append(kv_blocks)
        used = (
            ledger.static_extents + ledger.weight_extents(level) + ledger.staging_extents + kv_blocks // blocks * cost
        )
        assert 0 <= ledger.total_extents - used < cost
    assert capacities == sorted(capacities)
    assert capacities[0] >= 4


@given(
    budget=st.integers(0, 300), full=st.integers(300, 40 * EXTENT), share8=st.floats(0.4, 0.7),
    layers=st.integers(1, 8), cost=st.integers(1, 9),
)  # fmt: skip
def test_slots_of_any_size_fit_at_every_level_and_the_capacity_never_falls_on_the_way_down(
    budget: int, full: int, share8: float, layers: int, cost: int
) -> None:
    """Also slots much smaller than an extent, of which a second rung takes a whole extent more."""
    try:
        ledger = plan(
            budget * EXTENT, ("w8", "w4"), num_layers=layers, quantum=KVQuantum(3, cost),
            slot_bytes={"full": full, "w8": int(full * share8), "w4": int(full * share8 / 2)},
        )  # fmt: skip
    except ConfigError:
        return
    capacities = [ledger.kv_blocks_at_level(level) for level in range(ledger.max_level + 1)]
    assert capacities == sorted(capacities)
    assert capacities[0] >= 4
    for level, blocks in enumerate(capacities):
        used = ledger.static_extents + ledger.weight_extents(level) + ledger.staging_extents + blocks // 3 * cost
        assert used <= ledger.total_extents


def test_without_a_budget_it_is_made_to_hold_the_wanted_tokens() -> None:
    assert plan(0).kv_blocks_at_level(0) * 16 == 512


def test_a_budget_too_small_is_refused_with_the_least_that_holds() -> None:
    with pytest.raises(ConfigError, match=r"needs at least (\S+) GiB") as refused:
        plan(90 * EXTENT)
    least = float(str(refused.value).split("at least ")[1].split()[0])
    assert plan(round(least * GIB)).kv_blocks_at_level(0) >= 4


@pytest.mark.parametrize("least, fits", [(32, True), (33, False)])
def test_tokens_too_few_for_one_request_are_refused_by_their_own_name(least: int, fits: bool) -> None:
    if fits:
        assert plan(0, min_blocks=least).kv_blocks_at_level(0) == least
        return
    with pytest.raises(ConfigError, match=r"memory\.kv_tokens is 512, but one request of full length needs 528"):
        plan(0, min_blocks=least)


@pytest.mark.parametrize("extent_bytes", [3 * 1024, 0, -EXTENT])
def test_an_extent_that_is_not_whole_pages_is_refused_by_its_field(extent_bytes: int) -> None:
    with pytest.raises(ConfigError, match=r"memory\.extent_kib must be a multiple of \d+ KiB"):
        plan(0, extent_bytes=extent_bytes)


def test_the_description_adds_up() -> None:
    ledger = plan(200 * EXTENT, ("w8", "w4"))
    said = ledger.describe()
    kv = said["kv_blocks_level_0"] // ledger.quantum.blocks * ledger.quantum.extents * EXTENT
    assert said["static"] == 5 * EXTENT
    assert said["staging"] == 11 * EXTENT, "the largest quantized slot"
    assert said["weights_level_0"] == 80 * EXTENT
    assert said["weights_deepest"] == 24 * EXTENT
    idle = said["budget"] - said["static"] - said["staging"] - said["weights_level_0"] - kv
    assert 0 <= idle < ledger.quantum.extents * EXTENT


@given(st.integers(1, 2**40))
def test_extents_are_few_and_small(budget: int) -> None:
    size = auto_extent_bytes(budget)
    assert MIN_EXTENT_BYTES <= size <= MAX_EXTENT_BYTES
    assert size & (size - 1) == 0
    assert size == MAX_EXTENT_BYTES or budget <= size * MAX_EXTENTS
