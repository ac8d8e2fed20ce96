"""Few batch sizes are captured, every batch fits one of them, and little of it is padding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from morph_runtime.engine.cuda_graphs import MAX_SIZES, graph_sizes


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
