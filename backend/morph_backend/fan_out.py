"""One request with `n` outputs is `n` requests to the engine: the same prompt, other draws."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from morph_backend.open_request import OpenRequest
from morph_runtime.engine.messages import SamplingParams, Submit

SEED_RANGE = 2**63


def submissions(request: OpenRequest, sampling: SamplingParams) -> Iterator[Submit]:
    """What the engine is told of a request: one message for each output.

    All but the first wait until the first has put the prompt into the prefix cache.

    Args:
        request: the request.
        sampling: its parameters, ready for the engine.
    """
    for at, output in enumerate(request.outputs):
        yield Submit(
            key=output.key,
            prompt=request.prompt,
            sampling=sampling_of(sampling, at),
            arrival_s=request.arrival_s,
            slo_class=request.given.slo_class,
            after=request.key if at else 0,
        )


def sampling_of(sampling: SamplingParams, output: int) -> SamplingParams:
    """The parameters of one output: output i draws with the seed + i, as in vLLM, so the first keeps the seed.

    The first alone scores the prompt.
    """
    seed = None if sampling.seed is None else (sampling.seed + output) % SEED_RANGE
    scored = sampling.prompt_logprobs if output == 0 else None
    return msgspec.structs.replace(sampling, n=1, seed=seed, prompt_logprobs=scored)
