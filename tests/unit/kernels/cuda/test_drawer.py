"""The host's sampler on a GPU, interpreted: it draws what the step's own kernels draw."""

from __future__ import annotations

import msgspec
import pytest
import torch

from kernels.cuda.test_shape import shapes_of
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.kernels.cuda.drawer import CounterDrawer
from morph_runtime.kernels.cuda.shape import sample_shaped
from morph_runtime.sampling.sampler import Sampler
from sampling.rows_of import row

VOCAB = 300
SHAPES = (
    {}, {"temperature": 0.7}, {"top_p": 0.6}, {"top_k": 5}, {"min_p": 0.05, "temperature": 2.0},
    {"top_p": 0.9, "top_k": 20, "min_p": 0.01},
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_seed_gives_the_same_tokens_with_and_without_log_probabilities(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(len(SHAPES), VOCAB, generator=torch.Generator().manual_seed(1))).to(dtype)
    outputs = [list(range(at)) for at in range(len(SHAPES))]
    params = [SamplingParams(**{"temperature": 1.0, "seed": 10 + at, **shape}) for at, shape in enumerate(SHAPES)]
    scored = [msgspec.structs.replace(some, logprobs=1) for some in params]
    rows = [row(some, output) for some, output in zip(params, outputs, strict=True)]
    in_the_step = torch.zeros(len(rows), dtype=torch.int64)
    sample_shaped(
        logits.clone(), torch.tensor([some.temperature for some in params]),
        torch.tensor([each.draw_seed for each in rows]), torch.tensor([each.output_len for each in rows]),
        shapes_of(params), in_the_step,
    )  # fmt: skip

    sampler = Sampler((0,), torch.device("cpu"), draw=CounterDrawer())
    sampled = sampler.sample(logits.float(), [row(some, output) for some, output in zip(scored, outputs, strict=True)])

    assert sampled.tokens == in_the_step.tolist()
    assert len(sampled.logprobs) == len(rows)
