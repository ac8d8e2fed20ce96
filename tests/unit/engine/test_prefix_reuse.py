"""Cached blocks in a real engine: their bytes stay as they are while others read them, and steps get shorter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine.conftest import run_all, submit
from morph_runtime.engine.batch import make_batch
from morph_runtime.models.batch import check_batch, step_batch

if TYPE_CHECKING:
    from engine.conftest import EngineFactory

PROMPT = [*range(1, 41)]
"""Five blocks."""


def test_shared_blocks_keep_their_bytes_while_others_read_them_and_write_behind_them(
    tiny_model: Path, engines: EngineFactory
) -> None:
    engine = engines(tiny_model, memory={"kv_tokens": 1024})
    cache, pool = engine.parts.cache, engine.parts.pool
    submit(engine, 0, PROMPT, 1)
    run_all(engine)
    kept = [block for block in range(pool.capacity) if pool.is_kept(block)]
    assert len(kept) == 5
    digest = cache.digest(kept)

    def between(step: int) -> None:
        assert cache.digest(kept) == digest

    for cut in range(24, 40):  # at every place of a block: blocks are opened, and cleared behind their tokens, at each
        submit(engine, cut, [*PROMPT[:cut], 150], 12)
    run_all(engine, between)
    assert engine.stats().prefix_hits == 8 * 24 + 8 * 32
    assert cache.digest(kept) == digest


def test_the_tokens_of_a_cached_prefix_are_not_run_again(tiny_model: Path, engines: EngineFactory) -> None:
    engine = engines(tiny_model)
    scheduler, schedule = engine.parts.scheduler, engine.parts.scheduler.schedule
    counts: list[int] = []

    def counted(level: int):  # type: ignore[no-untyped-def]
        plan = schedule(level)
        batch, sampling = make_batch(plan, 8)
        check_batch(step_batch(batch), 8, engine.parts.max_model_len, 200, engine.parts.cache.mapped_blocks)
        assert [request.key for request in sampling] == [part.request.key for part in plan.slices if part.samples]
        counts.append(plan.num_tokens)
        return plan

    scheduler.schedule = counted  # type: ignore[method-assign]
    for key in range(2):
        submit(engine, key, PROMPT, 3)
        out = run_all(engine)
        assert len(out[key]) == 3
    assert counts[:3] == [40, 1, 1]
    assert counts[3:] == [8, 1, 1]


@pytest.mark.parametrize(("reuse", "after_the_burst"), [("at_least", 0), ("exact", 0), ("any", 32)])
def test_what_a_burst_wrote_is_reused_at_full_precision_only_if_the_setting_says_so(
    tiny_model: Path, engines: EngineFactory, reuse: str, after_the_burst: int
) -> None:
    engine = engines(tiny_model, cache={"reuse": reuse})
    engine.set_level(2)
    submit(engine, 0, PROMPT, 1)
    run_all(engine)
    engine.set_level(0)
    submit(engine, 1, PROMPT, 1)
    run_all(engine)
    assert engine.stats().prefix_hits == after_the_burst
    engine.set_level(2)
    submit(engine, 2, PROMPT, 1)
    run_all(engine)
    assert engine.stats().prefix_hits == after_the_burst + 32
