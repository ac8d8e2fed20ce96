"""Choosing the next token of each sequence from its logits.

Seeded requests draw from a counter: the generator of a token is seeded by (seed, position), so the
result depends neither on what else is in the batch nor on a preemption or restart in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from morph_runtime.engine.messages import TokenLogprobs
from morph_runtime.sampling.adjust import adjust
from morph_runtime.sampling.draw import draw
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.scores import token_logprobs
from morph_runtime.structured.masks import TokenMasks, rescue


@dataclass(frozen=True)
class Sampled:
    """What one step chose.

    Attributes:
        tokens: the next token of each row.
        logprobs: by row, for the rows that asked.
    """

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)


class Sampler:
    """Samples one token per row. Work is done for the rows that ask for it; a plain greedy row is one argmax."""

    def __init__(self, eos_token_ids: Sequence[int], device: torch.device, threads: int = 1) -> None:
        """`threads` compute the token masks of structured outputs."""
        self._eos = tuple(sorted(eos_token_ids))
        self._generator = torch.Generator(device=device)
        self._masks = TokenMasks(threads)

    def sample(
        self,
        logits: torch.Tensor,  # [rows, vocab] float32, contiguous; may be changed in place
        rows: Sequence[SamplingRow],
    ) -> Sampled:
        """The next token of each row, given the scores of its last position."""
        special = [i for i, row in enumerate(rows) if not row.plain]
        scored = [i for i in special if rows[i].scored]
        structured = [(i, matcher) for i in special if (matcher := rows[i].matcher) is not None]
        allowed: torch.Tensor | None = None
        if structured:
            for i, matcher in structured:
                matcher.advance(rows[i].sequence.tokens, rows[i].sequence.prompt_len)
            allowed = self._masks.apply(logits, structured)
        # Raw log probabilities are those under the grammar and before all else, as in vLLM.
        raw = logits[self._rows(scored)].log_softmax(dim=-1) if scored else logits[:0]
        adjusted = [i for i in special if rows[i].adjusts]
        if adjusted:
            adjust(logits, rows, adjusted, self._eos)
        if adjusted and allowed is not None:
            rescue(logits, [i for i, _ in structured], allowed)
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        drawn = [i for i, row in enumerate(rows) if row.draws]
        if drawn:
            some = logits if len(drawn) == len(rows) else logits[self._rows(drawn)]
            for i, token in zip(drawn, draw(some, [rows[i] for i in drawn], self._generator), strict=True):
                tokens[i] = token
        if not scored:
            return Sampled(tokens)
        for i in scored:
            if (given := rows[i].given) is not None:
                tokens[i] = given
        counts = [rows[i].params.logprobs or 0 for i in scored]
        found = token_logprobs(raw, [tokens[i] for i in scored], counts)
        return Sampled(tokens, dict(zip(scored, found, strict=True)))

    def _rows(self, which: list[int]) -> torch.Tensor:
        return torch.tensor(which, dtype=torch.int64, device=self._generator.device)
