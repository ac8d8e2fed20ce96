"""Which rows a device may sample by itself, and what it is told of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.sampling.adjust import adjust
from morph_runtime.sampling.shape import MOST_ENTRIES, ways
from sampling.rows_of import row

EOS = (2, 3)
VOCAB = 40
IDS = st.integers(0, VOCAB - 1)


@settings(max_examples=50)
@given(
    bias=st.dictionaries(IDS, st.floats(-100, 100, width=32), max_size=5),
    words=st.lists(IDS, max_size=5),
    stops=st.lists(IDS, max_size=5),
    min_tokens=st.integers(0, 4),
    output=st.integers(0, 5),
)
def test_entries_change_the_logits_as_adjust_does(
    bias: dict[int, float], words: list[int], stops: list[int], min_tokens: int, output: int
) -> None:
    one = row(
        SamplingParams(
            logit_bias=tuple(bias.items()), bad_word_ids=tuple((word,) for word in words), min_tokens=min_tokens,
            stop_token_ids=tuple(stops),
        ),
        output=[0] * output,
    )  # fmt: skip
    expected = torch.zeros(1, VOCAB)
    adjust(expected, [one], [0], EOS)

    found = ways([one], EOS)

    logits = torch.zeros(1, VOCAB)
    for entries in found.shaped.values():
        assert len(set(entries.tokens.tolist())) == len(entries.tokens)
        logits[0, torch.from_numpy(entries.tokens).long()] += torch.from_numpy(entries.biases)
    assert torch.equal(logits, expected) and not found.special


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logprobs=0), SamplingParams(score=True), SamplingParams(presence_penalty=0.1),
        SamplingParams(top_p=0.5, repetition_penalty=1.1), SamplingParams(bad_word_ids=((1,), (1, 2))),
        SamplingParams(logit_bias=tuple((token, 1.0) for token in range(MOST_ENTRIES + 1))),
    ],
    ids=["logprobs", "score", "presence", "repetition", "long word", "many biases"],
)  # fmt: skip
def test_what_the_device_cannot_do_is_the_hosts(params: SamplingParams) -> None:
    found = ways([row(SamplingParams()), row(params)], EOS)
    assert found.special == [1] and not found.shaped


def test_a_request_with_too_many_bans_stays_the_hosts_when_they_are_over() -> None:
    """Else its draws would come from another generator in the middle of its output."""
    biases = tuple((token, 1.0) for token in range(10, 10 + MOST_ENTRIES - 1))
    for output in ([], [0] * 9):
        found = ways([row(SamplingParams(logit_bias=biases, min_tokens=5), output)], EOS)
        assert found.special == [0]


def test_a_greedy_row_is_not_truncated_and_a_row_past_its_minimum_is_plain() -> None:
    rows = [
        row(SamplingParams(temperature=0.0, top_p=0.5, top_k=3)),
        row(SamplingParams(min_tokens=2), output=[0, 0]),
        row(SamplingParams(min_tokens=2), output=[0]),
        row(SamplingParams(temperature=0.5, min_p=0.1)),
    ]
    found = ways(rows, EOS)
    assert list(found.shaped) == [2, 3] and not found.special
    assert found.shaped[2].tokens.tolist() == list(EOS) and np.isneginf(found.shaped[2].biases).all()


def test_rows_of_the_step_before_leave_nothing_behind() -> None:
    pytest.importorskip("triton")
    from morph_runtime.engine.cuda_inputs import fill_shapes

    host = {name: np.full(4, 77.0, dtype=np.float32) for name in ("top_ps", "min_ps")}
    host |= {name: np.full(4, 77, dtype=np.int32) for name in ("top_ks", "entries")}
    host["entry_tokens"] = np.zeros((4, MOST_ENTRIES), dtype=np.int32)
    host["entry_biases"] = np.zeros((4, MOST_ENTRIES), dtype=np.float32)
    rows = [
        row(SamplingParams()),
        row(SamplingParams(top_p=0.5, top_k=9, min_p=0.25, logit_bias=((3, 1.5), (8, -2.0)))),
    ]

    fill_shapes(host, rows, ways(rows, EOS).shaped, padded=3)

    assert host["top_ps"].tolist() == [1.0, 0.5, 1.0, 77.0]
    assert host["top_ks"].tolist() == [0, 9, 0, 77]
    assert host["min_ps"].tolist() == [0.0, 0.25, 0.0, 77.0]
    assert host["entries"].tolist() == [0, 2, 0, 77]
    assert host["entry_tokens"][1, :2].tolist() == [3, 8] and host["entry_biases"][1, :2].tolist() == [1.5, -2.0]
