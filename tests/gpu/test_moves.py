"""The arena's thread and the real driver: pages move beside kernels, and what the driver refuses is accounted for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.conftest import make_model, run_all, submit
from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine

EXTENT = 2 << 20


@pytest.fixture
def arena() -> Iterator[Any]:
    from morph_runtime.memory.cuda import CudaPageArena

    torch.cuda.init()
    torch.zeros(1, device="cuda")  # the primary context is current
    arena = CudaPageArena(16, EXTENT)
    yield arena
    arena.close()


def test_pages_take_what_they_hold_along_while_kernels_run_elsewhere(arena: Any) -> None:
    one, two, still = (arena.reserve(name, 6 * EXTENT) for name in ("one", "two", "still"))
    views = {span: arena.tensor(span, 0, (6, EXTENT // 8), torch.int64) for span in (one, two, still)}
    arena.map(still, 0, 4).finish()
    arena.map(one, 0, 6).finish()
    views[still][:4].zero_()
    here, there = one, two
    for turn in range(1, 20):
        for piece in range(6):
            views[here][piece].fill_(100 * turn + piece)
        written = torch.cuda.Event()
        written.record()
        for _ in range(50):
            views[still][:4].add_(1)
        written.synchronize()
        for piece in range(6):
            arena.unmap(here, piece, 1)
            arena.map(there, piece, 1)  # the extent that has just been promised: the lowest one is next
        arena.settle()
        here, there = there, here
        held = sorted(views[here][:, 0].tolist())
        assert held == [100 * turn + piece for piece in range(6)]
    assert int(views[still][:4].min()) == int(views[still][:4].max()) == 19 * 50
    arena.check_integrity()


def test_a_mapping_that_the_driver_refuses_half_way_is_taken_back(arena: Any) -> None:
    span = arena.reserve("range", 4 * EXTENT)
    driver, in_the_way = arena._driver, arena._handles[15]
    arena._call(driver.cuMemMap(span.address + EXTENT, EXTENT, 0, in_the_way, 0))
    with pytest.raises(OSError, match="the CUDA driver says"):
        arena.map(span, 0, 3).finish()
    assert span.mapped == 0 and arena.free_extents == 16 and arena.is_settled
    arena._call(driver.cuMemUnmap(span.address + EXTENT, EXTENT))
    arena.map(span, 0, 3).finish()
    view = arena.tensor(span, 0, (3 * EXTENT,), torch.uint8)
    view.fill_(7)
    assert bool((view == 7).all())


def test_closing_does_what_was_ordered(arena: Any) -> None:
    span = arena.reserve("range", 8 * EXTENT)
    for _ in range(20):
        arena.map(span, 0, 8)
        arena.unmap(span, 0, 8)
    arena.map(span, 0, 8)


def test_while_an_engine_serves_only_the_arenas_thread_maps_and_unmaps(tmp_path: Path) -> None:
    """A layer is 19 MB, so that it has extents of its own."""
    engine = build_engine(EngineConfig.from_mapping({
        "device": "cuda",
        "model": {"path": str(make_model(tmp_path, kv_heads=16, width=8)), "dtype": "bfloat16"},
        "memory": {"kv_tokens": 512, "block_tokens": 16},
        "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 48},
        "morph": {"mode": "off", "ladder": ["w8", "w4"], "costs": "off"},
        "kernels": {"threads": 1},
        "check_integrity": True,
    }))  # fmt: skip
    arena: Any = engine.parts.arena
    callers: dict[str, set[str]] = {"_map": set(), "_unmap": set()}

    def noted(name: str) -> Any:
        call = getattr(arena, name)

        def run(*arguments: Any) -> None:
            callers[name].add(threading.current_thread().name)
            call(*arguments)

        return run

    for name in callers:
        setattr(arena, name, noted(name))
    try:
        for key in range(4):
            submit(engine, key, [key + 1] * 20, 80)

        def aim(step: int) -> None:
            if step % 9 == 0:
                engine.parts.shifter.target = step * 5 % 9

        assert [len(tokens) for tokens in run_all(engine, between=aim).values()] == [80] * 4
        assert callers == {"_map": {"page-moves"}, "_unmap": {"page-moves"}}
        engine.set_level(0)
        assert engine.parts.pool.capacity == engine.parts.capacities[0]
    finally:
        for name in callers:
            delattr(arena, name)
        engine.close()
