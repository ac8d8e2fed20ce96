"""Sampling with top_p, top_k, min_p, biases and bans on the GPU: against sorting, and against the host's sampler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels.cuda.oracle import kept_by
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.kernels.cuda.sample import sample
from morph_runtime.kernels.cuda.shape import Left, RowShapes, sample_shaped
from morph_runtime.sampling.adjust import adjust
from morph_runtime.sampling.draw import _keep_likely, _keep_top
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.shape import MOST_ENTRIES, RowShape
from sampling.rows_of import row

NEVER = float("-inf")
EOS = (128001, 128009)
CHOICES = [
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=0.6, top_p=0.95, top_k=50),
    SamplingParams(temperature=1.3, top_k=1),
    SamplingParams(temperature=1.0, top_k=65),
    SamplingParams(temperature=0.8, top_k=5000, top_p=0.5),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=2.0, min_p=1e-6, top_k=100_000, top_p=0.999),
    SamplingParams(temperature=0.7, top_p=0.8, min_tokens=4, logit_bias=((7, 3.3), (128000, -0.4))),
    SamplingParams(temperature=1.0, top_k=20, bad_word_ids=((11,), (12,)), min_tokens=4, stop_token_ids=(99,)),
]


def shapes_of(rows: list[SamplingRow]) -> RowShapes:
    tokens = torch.zeros(len(rows), MOST_ENTRIES, dtype=torch.int32)
    biases = torch.zeros(len(rows), MOST_ENTRIES)
    counts = []
    for at, one in enumerate(rows):
        entries = RowShape(one, EOS).entries(one.output_len)
        counts.append(len(entries))
        tokens[at, : len(entries)] = torch.from_numpy(entries.tokens)
        biases[at, : len(entries)] = torch.from_numpy(entries.biases)
    params = [one.params for one in rows]
    tensors = (
        torch.tensor([p.top_p for p in params]), torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.min_p for p in params]), torch.tensor(counts, dtype=torch.int32), tokens, biases,
    )  # fmt: skip
    return RowShapes(*(tensor.cuda() for tensor in tensors))


def run(logits: Tensor, rows: list[SamplingRow], seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens, and the scores [rows, vocab] float32 they were drawn from; -inf where a token could not be."""
    logits, shapes = logits.clone(), shapes_of(rows)
    temperatures = torch.tensor([one.params.temperature for one in rows], device="cuda")
    out = torch.zeros(len(rows), dtype=torch.int64, device="cuda")
    left = sample_shaped(logits, temperatures, seeds, positions, shapes, out)
    return out, drawn_from(logits, shapes, left)


def drawn_from(logits: Tensor, shapes: RowShapes, left: Left) -> Tensor:
    scores = logits.float().clone()
    for at, count in enumerate(shapes.counts.tolist()):
        scores[at, shapes.tokens[at, :count].long()] = left.lifted[at, :count]
    return scores.masked_fill(~(scores >= left.cuts[:, None]), NEVER)


def some_logits(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Flat, peaked, far from zero, around it."""
    spread = torch.tensor([0.02, 1.0, 3.0, 9.0], device="cuda").repeat(rows)[:rows, None]
    offset = torch.tensor([0.0, 14.0, -8.0], device="cuda").repeat(rows)[:rows, None]
    return (torch.randn(rows, vocab, device="cuda") * spread + offset).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [128_256, 151_936, 262_144, 130_001])
def test_what_stays_is_what_sorting_would_leave(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = [row(params) for params in CHOICES * 12]
    logits = some_logits(len(rows), vocab, dtype)
    places = torch.arange(len(rows), device="cuda")

    tokens, left = run(logits, rows, places, places)

    adjusted = logits.float().clone()
    adjust(adjusted, rows, range(len(rows)), EOS)
    for at, one in enumerate(rows):
        must, may = kept_by(adjusted[at], one.params)
        kept = left[at] > NEVER
        assert not (must & ~kept).any() and not (kept & ~may).any(), one.params
        assert kept[tokens[at]] and torch.equal(left[at][kept], adjusted[at][kept])


@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_the_hosts_sampler_leaves_the_same_tokens(spread: float) -> None:
    """In float32, where no two scores that matter are equal. top_p may cut a few tokens away: sums are rounded."""
    torch.manual_seed(1)
    rows = [row(params) for params in CHOICES]
    logits = torch.randn(len(rows), 128_256, device="cuda") * spread
    places = torch.arange(len(rows), device="cuda")
    _, left = run(logits, rows, places, places)
    adjust(logits, rows, range(len(rows)), EOS)
    for at, one in enumerate(rows):
        host = (logits[at : at + 1] / one.params.temperature).contiguous()
        host = _keep_top(_keep_likely(host, [one.params]), [one.params])[0] if one.truncates else host[0]
        there, here = host > NEVER, left[at] > NEVER
        assert (there ^ here).sum() <= (max(2, 1e-3 * there.sum()) if one.params.top_p < 1 else 0), one.params


def chi_squared(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_draws_have_the_distribution_of_what_is_left(vary: str) -> None:
    """40 tokens over four programs, one of them biased and so drawn apart from the others; top_k leaves 30."""
    tokens, draws, vocab = 40, 40_000, 8192
    places = torch.arange(tokens, device="cuda") * 200 + 3
    scores = torch.linspace(-3, 3, tokens, device="cuda")
    logits = torch.full((draws, vocab), NEVER, device="cuda")
    logits[:, places] = scores
    params = SamplingParams(temperature=0.8, top_k=30, top_p=0.98, logit_bias=((int(places[12]), 2.0),))
    fixed, varied = torch.full((draws,), 5, device="cuda"), torch.arange(draws, device="cuda")
    seeds, positions = (varied, fixed) if vary == "seeds" else (fixed, varied)

    one = shapes_of([row(params)])
    shapes = RowShapes(*(getattr(one, name).repeat_interleave(draws, 0) for name in one.__dataclass_fields__))
    chosen = torch.zeros(draws, dtype=torch.int64, device="cuda")
    sample_shaped(logits, torch.full((draws,), 0.8, device="cuda"), seeds, positions, shapes, chosen)

    scores[12] += 2.0
    must, may = kept_by(scores, params)
    assert torch.equal(must, may)
    index = torch.searchsorted(places, chosen)
    assert torch.equal(places[index], chosen) and must[index].all(), "a token that was cut away"
    counts = torch.bincount(index, minlength=tokens)[must].double()
    # At most 29 degrees of freedom: above 70 with a chance of 1 in 30,000 (and the seeds are fixed).
    assert chi_squared(counts, (scores / 0.8).double()[must].softmax(0)) < 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_shape_draw_what_they_always_drew_and_company_changes_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    rows = [row(SamplingParams(temperature=0.9)), *map(row, CHOICES), row(SamplingParams(temperature=0.0))] * 20
    logits = some_logits(len(rows), 128_256, dtype)
    seeds = torch.arange(len(rows), device="cuda") * 7919
    together, _ = run(logits, rows, seeds, seeds % 91)
    temperatures = torch.tensor([one.params.temperature for one in rows], device="cuda")
    alone = sample(logits, temperatures, seeds, seeds % 91)
    plain = torch.tensor([at for at, one in enumerate(rows) if one.plain and not one.truncates], device="cuda")
    assert torch.equal(together[plain], alone[plain])
    for at in (1, 7, 8, 100, 219):
        here = slice(at, at + 1)
        assert torch.equal(run(logits[here], rows[here], seeds[here], seeds[here] % 91)[0], together[here])


def test_out_of_a_graph_it_follows_new_shapes_and_logits() -> None:
    torch.manual_seed(3)
    rows = [row(params) for params in CHOICES]
    places = torch.arange(len(rows), device="cuda")
    first, second = some_logits(len(rows), 128_256, torch.bfloat16), some_logits(len(rows), 128_256, torch.bfloat16)
    expected, _ = run(second, rows[::-1], places, places)
    static, shapes, out = first.clone(), shapes_of(rows), torch.zeros_like(places)
    temperatures = torch.tensor([one.params.temperature for one in rows], device="cuda")
    sample_shaped(static, temperatures, places, places, shapes, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_shaped(static, temperatures, places, places, shapes, out)
    for name, tensor in vars(shapes_of(rows[::-1])).items():
        getattr(shapes, name).copy_(tensor)
    temperatures.copy_(temperatures.flip(0))
    static.copy_(second)
    graph.replay()
    assert torch.equal(out, expected)
