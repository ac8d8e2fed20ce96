"""Log probabilities are the model's own, whatever the sampling parameters do afterwards."""

from __future__ import annotations

import pytest
import torch

from morph_runtime.engine.messages import LOGPROB_MIN, SamplingParams
from sampling.rows_of import row, sampler

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
RAW = LOGITS.log_softmax(-1).tolist()


def test_the_chosen_token_comes_first_with_its_rank_then_the_most_likely_ones() -> None:
    params = SamplingParams(temperature=0, logprobs=2, bad_word_ids=((0,), (1,), (2,)))
    found = sampler().sample(LOGITS[None].clone(), [row(params)])
    assert found.tokens == [3]
    assert (found.logprobs[0].rank, found.logprobs[0].ids) == (4, [3, 0, 1])
    assert found.logprobs[0].values == pytest.approx([RAW[3], RAW[0], RAW[1]])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logprobs=0, temperature=0.3, seed=1),
        SamplingParams(logprobs=0, repetition_penalty=2.0, presence_penalty=2.0, seed=1),
        SamplingParams(logprobs=0, logit_bias=((5, 100.0),)),
        SamplingParams(logprobs=0, top_k=1),
        SamplingParams(logprobs=0, min_p=1.0),
        SamplingParams(score=True, seed=1),
    ],
)
def test_they_are_those_before_temperature_penalties_and_truncation(params: SamplingParams) -> None:
    found = sampler().sample(LOGITS[None].clone(), [row(params, (0, 1, 2))])
    assert found.logprobs[0].values == pytest.approx([RAW[found.tokens[0]]])
    assert found.logprobs[0].rank == found.tokens[0] + 1


def test_rows_that_do_not_ask_get_none_and_each_gets_its_own_number() -> None:
    rows = [row(SamplingParams(logprobs=n, temperature=0)) for n in (5, None, 0)]
    found = sampler().sample(LOGITS.repeat(3, 1), rows)
    assert {at: len(scores.ids) for at, scores in found.logprobs.items()} == {0: 6, 2: 1}


def test_more_than_the_vocabulary_gives_the_whole_vocabulary() -> None:
    found = sampler().sample(LOGITS[None].clone(), [row(SamplingParams(logprobs=20, temperature=0))])
    assert found.logprobs[0].ids == [0, 0, 1, 2, 3, 4, 5]


def test_an_impossible_token_has_a_number_that_json_knows() -> None:
    logits = LOGITS.clone()
    logits[3:] = float("-inf")
    found = sampler().sample(logits[None], [row(SamplingParams(logprobs=5, temperature=0))])
    assert found.logprobs[0].values[-1] == LOGPROB_MIN
