from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from morph_runtime.kernels.cuda.sample import sample


def draw(logits: Tensor, temperature: float, seeds: Tensor, positions: Tensor) -> Tensor:
    temperatures = torch.full((len(logits),), temperature, device="cuda")
    return sample(logits, temperatures, seeds, positions)


def chi_squared(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 256])
def test_temperature_zero_takes_the_first_of_the_largest(rows: int, dtype: torch.dtype) -> None:
    logits = torch.randn(rows, 128256, device="cuda").to(dtype)
    zeros = torch.zeros(rows, dtype=torch.int64, device="cuda")
    chosen = draw(logits, 0.0, zeros, zeros)
    largest = logits == logits.amax(1, keepdim=True)
    assert torch.equal(chosen, largest.int().argmax(1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_draws_have_the_distribution_of_the_softmax(vary: str, temperature: float) -> None:
    tokens, draws = 40, 200_000
    row = torch.linspace(-3, 3, tokens, device="cuda")
    places = torch.arange(tokens, device="cuda") * 200 + 3  # over four programs
    wide = torch.full((8192,), float("-inf"), device="cuda")
    wide[places] = row
    fixed, varied = torch.full((draws,), 5, device="cuda"), torch.arange(draws, device="cuda")
    seeds, positions = (varied, fixed) if vary == "seeds" else (fixed, varied)

    chosen = draw(wide.expand(draws, -1), temperature, seeds, positions)

    index = torch.searchsorted(places, chosen)
    assert torch.equal(places[index], chosen), "a token of probability 0"
    counts = torch.bincount(index, minlength=tokens).double()
    # 39 degrees of freedom: above 85 with a chance of 1 in 30,000 (and the seeds are fixed).
    assert chi_squared(counts, (row / temperature).double().softmax(0)) < 85
    pairs = torch.bincount((index[:-1] % 4) * 4 + index[1:] % 4, minlength=16).double()
    quarters = torch.zeros(4, dtype=torch.double, device="cuda")
    quarters.index_add_(0, torch.arange(tokens, device="cuda") % 4, (row / temperature).double().softmax(0))
    assert chi_squared(pairs, (quarters[:, None] * quarters).flatten()) < 45, "neighbours are not independent"


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(64, 128256, device="cuda")
    seeds, positions = torch.arange(64, device="cuda") * 7919 - 100, torch.arange(64, device="cuda")
    together = draw(logits, 0.8, seeds, positions)
    for row in (0, 31, 63):
        one = slice(row, row + 1)
        assert torch.equal(draw(logits[one].clone(), 0.8, seeds[one], positions[one]), together[one])
