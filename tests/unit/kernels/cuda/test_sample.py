from __future__ import annotations

import pytest
import torch
import triton.language as tl
from torch import Tensor

from morph_runtime.kernels.cuda.jit import kernel
from morph_runtime.kernels.cuda.sample import QUARTER, ROUNDS, gumbel, sample


def draw(logits: Tensor, temperature: float | list[float], seeds: list[int], positions: list[int]) -> list[int]:
    rows = len(logits)
    temperatures = torch.tensor(temperature if isinstance(temperature, list) else [temperature] * rows)
    return sample(logits, temperatures, torch.tensor(seeds), torch.tensor(positions)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 4 * QUARTER, 4 * QUARTER + 1, 10_000])
def test_temperature_zero_takes_the_first_of_the_largest(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(0)).round().to(dtype)
    assert draw(logits, 0.0, [1] * 5, [0] * 5) == logits.float().argmax(-1).tolist()


def test_draws_have_the_distribution_of_the_softmax() -> None:
    """A look at few draws, over a token in each run of a program; tests/gpu takes many, over more programs."""
    tokens, draws = 4, 80
    row = torch.linspace(-1.0, 1.0, tokens)
    places = torch.arange(tokens) * QUARTER + 3
    logits = torch.full((4 * QUARTER,), float("-inf"))
    logits[places] = row

    chosen = torch.tensor(draw(logits.expand(draws, -1), 0.5, list(range(draws)), [5] * draws))

    index = torch.searchsorted(places, chosen)
    assert torch.equal(places[index], chosen), "a token of probability 0"
    expected = (row / 0.5).softmax(0) * draws
    counts = torch.bincount(index, minlength=tokens)
    assert ((counts - expected) ** 2 / expected).sum() < 20  # 3 degrees of freedom: 1 in 5,000, and the seeds are fixed


@kernel
def _noise(out: tl.tensor, SIZE: tl.constexpr) -> None:
    lane = tl.arange(0, SIZE)
    zero = lane * 0
    b0, _b1, _b2, _b3 = tl.philox(tl.load(out).to(tl.int64), lane, zero, zero, zero, ROUNDS)
    tl.store(out + lane, gumbel(b0, False))


def test_the_noise_is_gumbel_out_to_the_tail() -> None:
    size = 1 << 17
    noise = torch.zeros(size)
    _noise[(1,)](noise, size)
    rank = noise.sort().values.double()
    empirical = (torch.arange(size) + 0.5) / size
    distance = (torch.exp(-torch.exp(-rank)) - empirical).abs().max()
    assert distance < 1.95 / size**0.5  # Kolmogorov and Smirnov: 1 in 1,000
    assert 9 < rank[-1] < 24 and noise.isfinite().all()


def test_a_draw_depends_on_its_row_seed_and_position_alone() -> None:
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(0))
    temperatures, seeds, positions = [1.0, 0.0, 0.7, 2.0, 1.0, 1.0], [3, 4, -5, 2**62, 3, 3], [0, 1, 2, 2**33, 1, 0]
    together = draw(logits, temperatures, seeds, positions)
    for row in range(6):
        one = slice(row, row + 1)
        assert draw(logits[one], temperatures[one], seeds[one], positions[one]) == together[one]
    wide = torch.cat((logits, torch.full((6, 100), 50.0)), 1)[:, :3000]  # rows of another stride
    assert draw(wide, temperatures, seeds, positions) == together


def test_seeds_and_positions_count_in_all_their_bits() -> None:
    logits = torch.zeros(1, 2000)
    seeds = [0, 1, 1 << 32, 1 << 62, -1]
    by_seed = {draw(logits, 1.0, [seed], [0])[0] for seed in seeds}
    by_position = {draw(logits, 1.0, [0], [position])[0] for position in (0, 1, 1 << 32)}
    assert len(by_seed) == len(seeds) and len(by_position) == 3


def test_what_is_no_number_is_never_drawn() -> None:
    logits = torch.full((4, 50), torch.nan)
    logits[:, 20] = -100.0
    logits[:, 30] = float("-inf")
    assert draw(logits, [0.0, 1.0, 0.0, 1.0], [1, 2, 3, 4], [0] * 4) == [20] * 4


def test_a_row_without_any_number_gives_a_token_of_the_vocabulary() -> None:
    assert all(0 <= token < 50 for token in draw(torch.full((2, 50), torch.nan), [0.0, 1.0], [1, 2], [0, 0]))


def test_other_types_of_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        sample(torch.zeros(1, 5), torch.zeros(1).double(), torch.zeros(1).long(), torch.zeros(1).long())
