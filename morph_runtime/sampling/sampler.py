"""Choosing the next token of each sequence from its logits.

Seeded requests draw noise that (seed, position) fixes, so the result depends neither on what else is in the batch nor
on a preemption or restart in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from morph_runtime.engine.messages import TokenLogprobs
from morph_runtime.sampling.adjust import adjust
from morph_runtime.sampling.draw import TEMPORARY_BYTES_PER_SCORE, Drawer, GeneratorDrawer
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.scores import token_logprobs
from morph_runtime.structured.masks import TokenMasks, rescue

CHUNK_BYTES = {"cpu": 8 << 20}
"""Temporaries of sampling, by the type of device: rows are drawn and scored in chunks that stay within them."""
CHUNK_BYTES_ELSEWHERE = 64 << 20
"""More where a chunk costs launches of kernels."""


def workspace_bytes(rows: int, vocab: int, device: torch.device) -> int:
    """Upper bound of the memory that a step's scores and choosing from them take, in bytes.

    Two float32 tensors of all rows: the scores, and raw log probabilities; what grammars allow; and the temporaries
    of one chunk.
    """
    chunk = min(rows, _chunk_rows(vocab, device))
    return (2 * 4 + 1) * rows * vocab + chunk * vocab * TEMPORARY_BYTES_PER_SCORE


def _chunk_rows(vocab: int, device: torch.device) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE) // (vocab * TEMPORARY_BYTES_PER_SCORE))


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

    def __init__(
        self, eos_token_ids: Sequence[int], device: torch.device, threads: int = 1, draw: Drawer | None = None
    ) -> None:
        """`threads` compute the token masks of structured outputs; `draw` draws, None: with generators' noise."""
        self._eos = tuple(sorted(eos_token_ids))
        self._device = device
        self._draw = draw or GeneratorDrawer(device)
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
            allowed = self._masks.apply(logits, structured, _chunk_rows(logits.shape[1], self._device))
        # Raw log probabilities are those under the grammar and before all else, as in vLLM.
        raw = self._log_probabilities(logits, scored)
        adjusted = [i for i in special if rows[i].adjusts]
        if adjusted:
            adjust(logits, rows, adjusted, self._eos)
        if adjusted and allowed is not None:
            rescue(logits, [i for i, _ in structured], allowed, _chunk_rows(logits.shape[1], self._device))
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        drawn = [i for i, row in enumerate(rows) if row.draws]
        for part in self._chunks(drawn, logits):
            chosen = self._draw(logits[self._rows(part)], [rows[i] for i in part])
            for i, token in zip(part, chosen, strict=True):
                tokens[i] = token
        if not scored:
            return Sampled(tokens)
        for i in scored:
            if (given := rows[i].given) is not None:
                tokens[i] = given
        found: dict[int, TokenLogprobs] = {}
        for part in self._chunks(scored, logits):
            counts = [rows[i].params.logprobs or 0 for i in part]
            some = raw[len(found) : len(found) + len(part)]
            found |= dict(zip(part, token_logprobs(some, [tokens[i] for i in part], counts), strict=True))
        return Sampled(tokens, found)

    def _log_probabilities(self, logits: torch.Tensor, scored: list[int]) -> torch.Tensor:
        """Log probabilities [scored, vocab] float32 of these rows."""
        raw = torch.empty(len(scored), logits.shape[1], dtype=logits.dtype, device=logits.device)
        done = 0
        for part in self._chunks(scored, logits):
            torch.log_softmax(logits[self._rows(part)], dim=-1, out=raw[done : done + len(part)])
            done += len(part)
        return raw

    def _chunks(self, which: list[int], logits: torch.Tensor) -> Iterator[list[int]]:
        """The rows `which` in parts whose temporaries stay within the bound."""
        size = _chunk_rows(logits.shape[1], self._device)
        return (which[at : at + size] for at in range(0, len(which), size))

    def _rows(self, which: list[int]) -> torch.Tensor:
        return torch.tensor(which, dtype=torch.int64, device=self._device)
