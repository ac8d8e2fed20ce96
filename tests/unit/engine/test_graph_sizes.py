"""Few batch sizes are captured, every batch fits one of them, and little of it is padding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from morph_runtime.engine.cuda_attention import rooms
from morph_runtime.engine.cuda_graphs import (
    GRAPH_BYTES,
    MAX_SIZES,
    ROOMS_BYTES,
    coarse_sizes,
    coarse_steps,
    graph_sizes,
    next_size,
    roomy_steps,
    step_sizes,
)


@given(st.integers(1, 4096))
def test_sizes_ascend_to_the_largest_batch_and_are_few(most: int) -> None:
    sizes = graph_sizes(most)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    assert len(sizes) <= MAX_SIZES


@given(st.integers(16, 256), st.integers(1, 256))
def test_padding_stays_below_a_batch_of_its_own_size(most: int, rows: int) -> None:
    size = next(n for n in graph_sizes(most) if n >= min(rows, most))
    assert size <= 2 * min(rows, most)


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_any_number_of_rows_fits_a_power_of_two_or_the_largest_size(most: int, rows: int) -> None:
    sizes = coarse_sizes(graph_sizes(most))
    size = next_size(sizes, min(rows, most))
    assert min(rows, most) <= size <= most
    assert size == most or size & (size - 1) == 0


@given(st.integers(1, 65536))
def test_sizes_of_steps_ascend_to_the_largest_step_and_are_few(most: int) -> None:
    sizes = step_sizes(most)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == most
    assert len(sizes) <= MAX_SIZES


@given(st.integers(512, 8192), st.integers(257, 8192))
def test_a_long_step_is_padded_by_half_at_most(most: int, tokens: int) -> None:
    assert next_size(step_sizes(most), min(tokens, most)) <= 1.5 * min(tokens, most) + 1


@given(st.integers(1, 4096), st.integers(1, 512))
def test_the_last_room_of_a_step_holds_whatever_may_be_in_it(size: int, sequences: int) -> None:
    decodes, chunks = rooms(size, sequences)[-1]
    assert decodes == min(size, sequences)
    assert chunks == min(size // 2, sequences), "a chunk has two tokens or more"
    assert len(rooms(size, sequences)) <= 2


@given(st.integers(1, 65536))
def test_few_steps_are_captured_layer_by_layer_and_any_fits_one(most: int) -> None:
    sizes = step_sizes(most)
    assert set(coarse_steps(sizes)) <= set(sizes)
    assert coarse_steps(sizes)[-1] == most
    assert len(coarse_steps(sizes)) <= len(sizes) // 2 + 2


@given(st.integers(1, 16384), st.integers(1, 500))
def test_second_rooms_of_layers_are_for_the_largest_steps_and_bounded(most: int, graphs: int) -> None:
    sizes = coarse_steps(step_sizes(most))
    roomy = roomy_steps(sizes, graphs)
    assert roomy == sizes[len(sizes) - len(roomy) :]
    assert len(roomy) * graphs * GRAPH_BYTES <= ROOMS_BYTES
    assert len(roomy) == len(sizes) or (len(roomy) + 1) * graphs * GRAPH_BYTES > ROOMS_BYTES
