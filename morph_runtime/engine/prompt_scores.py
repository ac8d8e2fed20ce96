"""Log probabilities of prompts: the positions of a prefill chunk become rows of the sampler whose token is known."""

from __future__ import annotations

from collections.abc import Mapping

from morph_runtime.engine.messages import SamplingParams, TokenLogprobs
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.scheduler import StepPlan


def scoring_rows(plan: StepPlan) -> list[SamplingRow]:
    """The rows of a step after those that sample, in the order of its logits."""
    rows: list[SamplingRow] = []
    for part, first, count in plan.scored:
        request = plan.slices[part].request
        params = SamplingParams(temperature=0.0, logprobs=request.sampling.prompt_logprobs)
        following = request.tokens[first + 1 : first + 1 + count]
        rows += [SamplingRow(params, request, given=token) for token in following]
    return rows


def book_scores(plan: StepPlan, scores: Mapping[int, TokenLogprobs], row: int) -> None:
    """Give the scores of a step's rows, from `row` on, to its requests."""
    for part, _, count in plan.scored:
        plan.slices[part].request.prompt_scores += [scores[at] for at in range(row, row + count)]
        row += count
