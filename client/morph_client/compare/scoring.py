"""How well the model at full precision would have predicted what a configuration wrote.

The text is given to the server, pinned at full precision, as part of a prompt, and the log probabilities of the prompt
are read back. The text is cut into tokens anew for that, which may join it to the prompt a token differently.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from morph_client.aio_client import AsyncMorphClient
from morph_client.errors import InvalidRequest
from morph_client.types import SamplingParams

_AT_ONCE = 4


@dataclass(frozen=True)
class Score:
    """Of one output."""

    tokens: int
    nll: float
    """Negative log likelihood of all of its tokens, in nats."""


class Scorer:
    """Scores texts, each once: equal outputs of repeats cost nothing."""

    def __init__(self, client: AsyncMorphClient) -> None:
        self._client = client
        self._known: dict[tuple[str, str], Score | None] = {}
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def score(self, texts: Sequence[tuple[str, int, str]]) -> list[Score | None]:
        """Scores (prompt, its length in tokens, output); ``None`` where prompt and output exceed the context."""
        fresh = {(prompt, text): tokens for prompt, tokens, text in texts if (prompt, text) not in self._known}
        found = await asyncio.gather(*(self._one(prompt, tokens, text) for (prompt, text), tokens in fresh.items()))
        self._known.update(zip(fresh, found, strict=True))
        return [self._known[prompt, text] for prompt, _, text in texts]

    async def _one(self, prompt: str, prompt_tokens: int, text: str) -> Score | None:
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        async with self._places:
            try:
                answer = await self._client.generate(prompt + text, sampling=sampling)
            except InvalidRequest:
                return None
        scored = [at[0].logprob for at in answer.prompt_logprobs[prompt_tokens:] if at is not None]
        return Score(len(scored), -math.fsum(scored)) if scored else None


@dataclass(frozen=True)
class Quality:
    """Of all scored outputs of a configuration."""

    outputs: int
    tokens: int
    perplexity: float


def quality(scores: Mapping[int, Score]) -> Quality | None:
    """``scores`` by request; ``None`` for none."""
    tokens = sum(s.tokens for s in scores.values())
    if not tokens:
        return None
    return Quality(len(scores), tokens, math.exp(sum(s.nll for s in scores.values()) / tokens))


def change(scores: Mapping[int, Score], baseline: Mapping[int, Score]) -> tuple[float, float] | None:
    """Relative change of perplexity against the baseline, over the requests in both, and its standard error.

    The error is that of the mean over requests, which are paired: both configurations got the same prompts.
    """
    both = sorted(scores.keys() & baseline.keys())
    weights = [(scores[i].tokens + baseline[i].tokens) / 2 for i in both]
    if len(both) < 2 or not all(weights):
        return None
    differences = [scores[i].nll / scores[i].tokens - baseline[i].nll / baseline[i].tokens for i in both]
    total = sum(weights)
    mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / total
    spread = sum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True))
    error = math.sqrt(spread * len(both) / (len(both) - 1)) / total
    return math.expm1(mean), math.exp(mean) * error
