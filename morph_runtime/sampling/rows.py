"""What the sampler knows of one sequence."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.sampling.penalties import PenaltyState
from morph_runtime.structured.matcher import GrammarMatcher

if TYPE_CHECKING:
    from morph_runtime.sampling.shape import RowShape

GREEDY_BELOW = 1e-5
"""A temperature under this means the most likely token, as in vLLM."""


class TokenSequence(Protocol):
    """Prompt and output so far; `tokens` grows as tokens are chosen."""

    tokens: list[int]
    prompt_len: int


class SamplingRow:
    """The sampling state of one request, from its submission to its end.

    Kept across preemptions, for the tokens are kept: what it remembers is only ever advanced. A row with a `given`
    token stands for one position of a prompt: nothing is chosen there, that token is scored.

    Attributes:
        draws: a token is drawn, not the most likely taken.
        truncates: it is drawn from some tokens alone: those that top_p, top_k and min_p leave.
        draw_seed: for devices that draw by counter; the request's seed, or a random one.
        adjusts: bans, bias or penalties change the logits before a token is chosen.
        scored: log probabilities are asked for.
        penalties: counts for the penalties; None without any.
        matcher: the grammar that the output follows; None without one.
        plain: none of these but `draws`.
        given: the token that follows, if that is known; None to choose one.
        needs_values: choosing the next token takes the values of those before it, not only their number.
        shape: what a device keeps of it (`sampling.shape`); None before it is asked for.
    """

    __slots__ = (
        "adjusts",
        "draw_seed",
        "draws",
        "given",
        "matcher",
        "needs_values",
        "params",
        "penalties",
        "plain",
        "scored",
        "sequence",
        "shape",
        "truncates",
    )

    def __init__(
        self,
        params: SamplingParams,
        sequence: TokenSequence,
        matcher: GrammarMatcher | None = None,
        given: int | None = None,
    ) -> None:
        self.params = params
        self.given = given
        self.sequence = sequence
        self.matcher = matcher
        self.penalties = PenaltyState() if _is_penalised(params) else None
        self.draws = params.temperature >= GREEDY_BELOW
        self.truncates = self.draws and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)
        self.shape: RowShape | None = None
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        self.draw_seed = seed & (2**63 - 1)
        self.scored = params.logprobs is not None or params.score
        self.adjusts = bool(params.min_tokens or params.bad_word_ids or params.logit_bias or self.penalties)
        self.plain = not (self.adjusts or self.scored or matcher is not None)
        long_words = any(len(word) > 1 for word in params.bad_word_ids)
        self.needs_values = long_words or self.penalties is not None or matcher is not None

    @property
    def output_len(self) -> int:
        """Tokens generated so far, those included whose values are not known yet."""
        return len(self.sequence.tokens) - self.sequence.prompt_len


def _is_penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
