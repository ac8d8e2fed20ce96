"""The arrays of a step say what the scheduler's books said at its launch, and go on saying it."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from morph_runtime.engine.batch import make_batch
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.models.batch import HostBatch, check_batch, step_batch
from morph_runtime.scheduler import Request, ScheduledSlice, StepPlan

BLOCK = 4
PARTS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.booleans()), min_size=1, max_size=9)
DECODES = st.lists(st.tuples(st.integers(0, 30), st.just(1), st.booleans()), min_size=1, max_size=9)


def planned(parts: list[tuple[int, int, bool]]) -> StepPlan:
    """A plan of slices (start, length, samples), each of a request with its own tokens and scattered blocks."""
    slices = []
    for key, (start, length, samples) in enumerate(parts):
        request = Request(key, [100 * key + i for i in range(start + length)], 1, SamplingParams())
        request.blocks = array("i", [97 * (key + 1) % 89 * 10 + i for i in range((start + length) // BLOCK + 1)][::-1])
        slices.append(ScheduledSlice(request, start, length, samples))
    return StepPlan(slices)


@given(PARTS | DECODES)
def test_every_token_stands_with_its_position_slot_and_sequence(parts: list[tuple[int, int, bool]]) -> None:
    plan = planned(parts)
    batch, sampling = make_batch(plan, BLOCK)
    ids, positions, slots, wanted = [], [], [], []
    for request, start, length, samples in plan.slices:
        for position in range(start, start + length):
            ids.append(request.tokens[position])
            positions.append(position)
            slots.append(request.blocks[position // BLOCK] * BLOCK + position % BLOCK)
        wanted += [len(ids) - 1] if samples else []
    assert batch.token_ids.tolist() == ids
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.logits_at.tolist() == wanted
    assert sampling == [part.request for part in plan.slices if part.samples]
    assert batch.all_decodes == all(length == 1 for _, length, _ in parts)
    assert (batch.num_tokens, batch.num_sequences) == (len(ids), len(parts))
    step = step_batch(batch)
    assert step.block_tables == [list(part.request.blocks) for part in plan.slices]
    check_batch(step, BLOCK, 100, 2000, 1000)


@given(PARTS)
def test_a_batch_stays_as_it_is_when_tables_and_tokens_go_on(parts: list[tuple[int, int, bool]]) -> None:
    plan = planned(parts)
    batch, _ = make_batch(plan, BLOCK)
    before = [getattr(batch, name).tolist() for name in HostBatch.__dataclass_fields__]
    for request, *_ in plan.slices:
        request.tokens[:] = [0] * len(request.tokens)
        request.blocks[0] += 1
        request.blocks.append(5)
    assert [getattr(batch, name).tolist() for name in HostBatch.__dataclass_fields__] == before


@given(PARTS)
def test_padded_tables_hold_each_table_and_leave_the_rest(parts: list[tuple[int, int, bool]]) -> None:
    plan = planned(parts)
    batch, _ = make_batch(plan, BLOCK)
    out = np.full((len(parts) + 1, 12), -7, dtype=np.int32)
    batch.pad_tables(out)
    for row, part in enumerate(plan.slices):
        table = list(part.request.blocks)
        assert out[row].tolist() == table + [-7] * (12 - len(table))
    assert (out[-1] == -7).all()


def test_unknown_tokens_are_taken_from_the_rows_of_the_step_before() -> None:
    plan = planned([(3, 1, True), (0, 4, True), (5, 1, True)])
    plan.slices[0].request.tokens[3] = -2
    plan.slices[2].request.tokens[5] = -1
    batch, _ = make_batch(plan, BLOCK)
    assert batch.known_ids([50, 60]).tolist() == [60, 100, 101, 102, 103, 50]
    assert batch.token_ids.tolist()[0] == -2, "the plan itself stays"
