"""Each sampling parameter does to the distribution what its name says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_runtime.engine.messages import SamplingParams
from sampling.rows_of import row, sampler

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
DRAWS = 6000
OUTPUT = (4, 1, 4, 4)


def frequencies(params: SamplingParams, output: Sequence[int] = (5,) * 5, prompt: Sequence[int] = ()) -> list[float]:
    torch.manual_seed(0)
    rows = [row(params, output, prompt) for _ in range(DRAWS)]
    counts = Counter(sampler().sample(LOGITS.repeat(DRAWS, 1), rows).tokens)
    return [counts[i] / DRAWS for i in range(len(LOGITS))]


def share(logits: torch.Tensor) -> list[float]:
    return pytest.approx(logits.softmax(-1).tolist(), abs=0.025)  # type: ignore[no-any-return]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_given_temperature(temperature: float) -> None:
    assert frequencies(SamplingParams(temperature=temperature)) == share(LOGITS / temperature)


def test_top_k_keeps_the_k_most_likely_and_renormalises() -> None:
    expected = [*LOGITS[:2].softmax(-1).tolist(), 0, 0, 0, 0]
    assert frequencies(SamplingParams(top_k=2)) == pytest.approx(expected, abs=0.025)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    likely = LOGITS.softmax(-1)
    assert likely[0] < 0.7 < likely[:2].sum()
    expected = [*LOGITS[:2].softmax(-1).tolist(), 0, 0, 0, 0]
    assert frequencies(SamplingParams(top_p=0.7)) == pytest.approx(expected, abs=0.025)


def test_a_tiny_top_p_is_greedy() -> None:
    assert frequencies(SamplingParams(top_p=1e-6)) == [1, 0, 0, 0, 0, 0]


def test_min_p_drops_what_is_less_likely_than_a_share_of_the_best() -> None:
    # Relative to the best: 1, 0.37, 0.22, 0.14, 0.05, 0.007.
    expected = [*LOGITS[:3].softmax(-1).tolist(), 0, 0, 0]
    assert frequencies(SamplingParams(min_p=0.2)) == pytest.approx(expected, abs=0.025)


def test_min_p_counts_after_temperature() -> None:
    # At temperature 2 the shares are 1, 0.61, 0.47, 0.37, 0.22, 0.08.
    expected = [*(LOGITS[:4] / 2).softmax(-1).tolist(), 0, 0]
    assert frequencies(SamplingParams(min_p=0.3, temperature=2.0)) == pytest.approx(expected, abs=0.025)


def test_min_p_of_one_is_greedy() -> None:
    assert frequencies(SamplingParams(min_p=1.0)) == [1, 0, 0, 0, 0, 0]


def test_presence_penalty_counts_once_and_in_the_output_alone() -> None:
    wanted = LOGITS - 1.5 * torch.tensor([0, 1, 0, 0, 1, 0])
    assert frequencies(SamplingParams(presence_penalty=1.5), OUTPUT, prompt=(0, 0)) == share(wanted)


def test_frequency_penalty_counts_every_occurrence() -> None:
    wanted = LOGITS - 0.5 * torch.tensor([0, 1, 0, 0, 3, 0])
    assert frequencies(SamplingParams(frequency_penalty=0.5), OUTPUT, prompt=(0, 0)) == share(wanted)


def test_a_negative_frequency_penalty_favours_repetition() -> None:
    wanted = LOGITS + torch.tensor([0, 1, 0, 0, 3, 0])
    assert frequencies(SamplingParams(frequency_penalty=-1.0), OUTPUT) == share(wanted)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    wanted = LOGITS.clone()
    wanted[0] /= 2
    wanted[1] /= 2
    wanted[4] *= 2
    assert frequencies(SamplingParams(repetition_penalty=2.0), OUTPUT, prompt=(0,)) == share(wanted)


def test_logit_bias_is_added() -> None:
    wanted = LOGITS + torch.tensor([-100.0, 0, 0, 0, 0, 4.0])
    assert frequencies(SamplingParams(logit_bias=((0, -100.0), (5, 4.0)))) == share(wanted)


def test_all_of_them_together_apply_in_vllms_order() -> None:
    params = SamplingParams(
        bad_word_ids=((2,),), logit_bias=((3, 1.0),), repetition_penalty=2.0, presence_penalty=0.5, temperature=1.5
    )
    wanted = LOGITS.clone()
    wanted[2] = float("-inf")
    wanted[3] += 1.0
    wanted[1], wanted[3], wanted[4] = wanted[1] / 2, wanted[3] / 2, wanted[4] * 2
    wanted -= 0.5 * torch.tensor([0, 1, 0, 0, 1, 0])
    assert frequencies(params, OUTPUT, prompt=(3,)) == share(wanted / 1.5)


@pytest.mark.parametrize(
    "words, output, banned",
    [
        (((0,),), (), {0}),
        (((1, 0),), (), set()),
        (((1, 0),), (5, 1), {0}),
        (((1, 0),), (1, 5), set()),
        (((2, 1, 0), (1, 2)), (2, 1), {0, 2}),
        (((0, 0, 0),), (0, 0), {0}),
        (((0, 0, 0),), (0,), set()),
    ],
)
def test_a_bad_word_cannot_be_completed(
    words: tuple[tuple[int, ...], ...], output: list[int], banned: set[int]
) -> None:
    found = frequencies(SamplingParams(bad_word_ids=words, temperature=3.0), output)
    assert {i for i, f in enumerate(found) if f == 0} == banned


def test_a_bad_word_that_began_in_the_prompt_is_not_seen() -> None:
    assert frequencies(SamplingParams(bad_word_ids=((1, 0),)), (), prompt=(1,))[0] > 0


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert sampler().sample(LOGITS[None].clone(), [row(SamplingParams(temperature=0))]).tokens == [0]


def test_min_tokens_forbids_every_end_token_until_reached() -> None:
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=(1,))
    rows = [row(params, (5,) * 2), row(params, (5,) * 3)]
    assert sampler().sample(LOGITS.repeat(2, 1), rows).tokens == [2, 0]


FEATURES = [
    SamplingParams(seed=5, min_p=0.1),
    SamplingParams(seed=5, top_k=20, top_p=0.9),
    SamplingParams(seed=5, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    SamplingParams(seed=5, bad_word_ids=((3,), (4, 5)), logit_bias=((7, 2.0),)),
    SamplingParams(seed=5, min_tokens=9, logprobs=3),
    SamplingParams(seed=5),
]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(FEATURES), max_size=5), st.sampled_from(FEATURES), st.integers(0, 5), st.data())
def test_a_seed_gives_the_same_token_whatever_else_is_in_the_batch(
    others: list[SamplingParams], mine: SamplingParams, at: int, data: st.DataObject
) -> None:
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(3))
    output = data.draw(st.lists(st.integers(0, 99), max_size=8))
    alone = sampler().sample(logits[:1].clone(), [row(mine, output, (3, 4))])
    batch = [row(p, [9] * i) for i, p in enumerate(others)]
    at = min(at, len(batch))
    batch.insert(at, row(mine, output, (3, 4)))
    order = [*range(1, at + 1), 0, *range(at + 1, len(batch))]
    mixed = sampler().sample(logits[order].clone(), batch)
    assert mixed.tokens[at] == alone.tokens[0]
    assert mixed.logprobs.get(at) == alone.logprobs.get(0)


def test_seeds_and_positions_differ() -> None:
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(3))

    def tokens(seed: int) -> list[int]:
        return [
            sampler().sample(logits.clone(), [row(SamplingParams(seed=seed), [1] * n)]).tokens[0] for n in range(20)
        ]

    assert tokens(11) == tokens(11) != tokens(12)
    assert len(set(tokens(11))) > 5


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 30), max_size=12),
    st.lists(st.integers(0, 30), max_size=600),
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.floats(0.5, 2),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties_that_follow_a_growing_sequence_are_those_of_the_whole_one(
    prompt: list[int], output: list[int], pieces: list[int], repetition: float, presence: float, frequency: float
) -> None:
    params = SamplingParams(
        temperature=0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    growing = row(params, (), prompt)
    logits = torch.randn(1, 31, generator=torch.Generator().manual_seed(1))
    turn = 0
    while growing.output_len < len(output):
        growing.sequence.tokens.extend(output[growing.output_len :][: pieces[turn % len(pieces)]])
        adjusted, turn = logits.clone(), turn + 1
        sampler().sample(adjusted, [growing])
        expected = logits[0].clone()
        counts = Counter(growing.sequence.tokens[len(prompt) :])
        for token in set(growing.sequence.tokens):
            value = expected[token]
            expected[token] = value / repetition if value > 0 else value * repetition
            expected[token] -= frequency * counts[token] + presence * (counts[token] > 0)
        torch.testing.assert_close(adjusted[0], expected)
