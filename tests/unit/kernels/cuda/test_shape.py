"""The shaping kernels, interpreted, against sorting and against the host's sampler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cuda.oracle import kept_by
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.kernels.cuda.sample import sample
from morph_runtime.kernels.cuda.shape import RowShapes, sample_shaped
from morph_runtime.sampling.adjust import adjust
from morph_runtime.sampling.draw import _keep_likely, _keep_top
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.shape import Entries, RowShape
from sampling.rows_of import row

ENTRIES = 8
NEVER = float("-inf")


def shapes_of(params: list[SamplingParams], entries: list[dict[int, float]] | None = None) -> RowShapes:
    count = len(params)
    entries = entries or [{}] * count
    tokens, biases = torch.full((count, ENTRIES), -7, dtype=torch.int32), torch.full((count, ENTRIES), torch.nan)
    for at, some in enumerate(entries):
        tokens[at, : len(some)] = torch.tensor(list(some), dtype=torch.int32)
        biases[at, : len(some)] = torch.tensor(list(some.values()))
    return RowShapes(
        torch.tensor([p.top_p for p in params]), torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.min_p for p in params]), torch.tensor([len(some) for some in entries], dtype=torch.int32),
        tokens, biases,
    )  # fmt: skip


def run(
    logits: Tensor, params: list[SamplingParams], entries: list[dict[int, float]] | None = None, seeds: int = 0
) -> tuple[list[int], Tensor]:
    """The tokens, and the scores [rows, vocab] float32 they were drawn from; -inf where a token could not be."""
    logits, shapes, rows = logits.clone(), shapes_of(params, entries), len(params)
    out = torch.zeros(rows, dtype=torch.int64)
    temperatures = torch.tensor([p.temperature for p in params])
    left = sample_shaped(logits, temperatures, torch.arange(rows) + seeds, torch.arange(rows) % 5, shapes, out)
    scores = logits.float().clone()
    for at, some in enumerate(entries or []):
        scores[at, list(some)] = left.lifted[at, : len(some)]
    return out.tolist(), scores.masked_fill(~(scores >= left.cuts[:, None]), NEVER)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.01, 0.5, 0.8, 1.0, 3.0]),
    top_p=st.one_of(st.just(1.0), st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 0.9999999])),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 64, 65, 300, 4097, 2**31 - 1]),
    min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.05, 0.5, 1.0]),
)


@settings(max_examples=15)
@given(
    params=PARAMS,
    vocab=st.sampled_from([1, 2, 31, 100, 1009, 4096, 4099]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.0, 0.3, 4.0, 30.0]),
    offset=st.sampled_from([-20.0, 0.0, 15.0]),
    seed=st.integers(0, 2**31),
    entries=st.dictionaries(st.integers(0, 30), st.sampled_from([NEVER, -100.0, -0.37, 0.0, 5.01]), max_size=ENTRIES),
)
def test_what_stays_is_what_sorting_would_leave(
    params: SamplingParams, vocab: int, dtype: torch.dtype, spread: float, offset: float, seed: int,
    entries: dict[int, float],
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(1, vocab, generator=generator) * spread + offset).to(dtype)
    entries = {token: bias for token, bias in entries.items() if token < vocab}
    scores = logits[0].float().clone()
    for token, bias in entries.items():
        scores[token] += bias

    (token,), left = run(logits, [params], [entries])

    if scores.max() > NEVER:
        must, may = kept_by(scores, params)
        kept = left[0] > NEVER
        assert not (must & ~kept).any() and not (kept & ~may).any()
        assert kept.any() and kept[token]
        assert torch.equal(left[0][kept], scores[kept]), "a score has changed"
    assert 0 <= token < vocab


def test_the_host_leaves_the_same_tokens() -> None:
    """All rows in one call, no two scores of a row equal; biases and bans as `adjust` applies them."""
    params = [
        SamplingParams(temperature=0.7, top_p=0.8),
        SamplingParams(temperature=1.0, top_k=40),
        SamplingParams(temperature=1.5, min_p=0.02),
        SamplingParams(temperature=1.0, top_p=0.95, top_k=100, min_p=0.001),
        SamplingParams(temperature=0.9, top_p=0.9, top_k=30, min_tokens=3, logit_bias=((4, 2.5), (9, -100.0))),
        SamplingParams(temperature=1.0, top_k=7, min_p=0.3, bad_word_ids=((5,), (6,))),
        SamplingParams(temperature=1.0),
    ]
    logits = torch.randn(len(params), 701)
    logits[4, 7] = logits[4, 4] = 6.0  # an end of sequence that would be drawn, a bias that matters
    rows = [row(one) for one in params]
    host = logits.clone()
    adjust(host, rows, [4, 5], eos=(7,))
    host /= torch.tensor([one.temperature for one in params])[:, None]
    for at, one in enumerate(params):
        host[at] = _keep_top(_keep_likely(host[at : at + 1], [one]), [one])[0]

    entries = [dict(zip(e.tokens.tolist(), e.biases.tolist(), strict=True)) for e in entries_of(rows, eos=(7,))]
    tokens, left = run(logits, params, entries)

    assert torch.equal(left > NEVER, host > NEVER)
    assert (left > NEVER).sum(1)[[1, 6]].tolist() == [40, 701]
    assert all(left[at, token] > NEVER for at, token in enumerate(tokens))


def entries_of(rows: list[SamplingRow], eos: tuple[int, ...]) -> list[Entries]:
    return [RowShape(one, eos).entries(one.output_len) for one in rows]


def test_company_changes_no_token_and_a_row_without_a_shape_draws_as_ever() -> None:
    plain, shaped = SamplingParams(temperature=0.9), SamplingParams(temperature=0.9, top_p=0.7, top_k=30)
    logits = torch.randn(4, 2100)
    together, _ = run(logits, [plain, shaped, SamplingParams(temperature=0.0), shaped], [{}, {3: 4.0}, {}, {}])
    zeros = torch.arange(4)
    assert [together[0], together[2]] == sample(logits, torch.tensor([0.9, 0, 0, 0]), zeros, zeros).tolist()[:3:2]
    for at, some in ((1, {3: 4.0}), (3, {})):
        out = torch.zeros(1, dtype=torch.int64)
        one, place = logits[at : at + 1].clone(), torch.tensor([at])
        sample_shaped(one, torch.tensor([0.9]), place, place, shapes_of([shaped], [some]), out)
        assert out.item() == together[at]


def test_a_bias_of_nothing_leaves_every_draw_as_it_was() -> None:
    """What is lifted out of its row is drawn with the noise of its place there."""
    rows, tokens = 8, [0, 1, 511, 512, 1024, 1536, 2047, 2048]
    logits = torch.full((rows, 2100), -9.0)
    logits[:, tokens] = torch.randn(rows, len(tokens))
    seeds = torch.arange(rows)
    drawn = sample(logits, torch.ones(rows), seeds, seeds % 5)
    lifted, _ = run(logits, [SamplingParams()] * rows, [dict.fromkeys(tokens, 0.0)] * rows)
    assert lifted == drawn.tolist() and len(set(lifted)) > 3


def test_bans_and_biases_hold_for_greedy_rows_too_and_in_float32() -> None:
    logits = torch.full((4, 300), -1.0, dtype=torch.bfloat16)
    logits[:, 8], logits[:, 70], logits[:, 90] = 24.0, 23.875, 23.875
    greedy = [SamplingParams(temperature=0.0)] * 4
    # 23.875 and 24 are neighbours in bfloat16.
    entries = [{}, {8: NEVER}, {8: NEVER, 90: 0.01}, {70: 0.13, 8: 0.001}]
    assert run(logits, greedy, entries)[0] == [8, 70, 90, 70]


def test_a_row_of_which_everything_is_banned_gives_a_token_of_the_vocabulary() -> None:
    params = [SamplingParams(top_p=0.5, top_k=2), SamplingParams(temperature=0.0)]
    tokens, _ = run(torch.zeros(2, 3), params, [dict.fromkeys(range(3), NEVER)] * 2)
    assert all(0 <= token < 3 for token in tokens)


def test_what_is_no_number_is_never_drawn() -> None:
    logits = torch.full((3, 50), torch.nan)
    logits[:, 20], logits[:, 21] = -100.0, -300.0
    logits[2, 30] = torch.inf
    params = [SamplingParams(top_p=0.9), SamplingParams(top_k=1), SamplingParams(top_k=1, top_p=0.5)]
    assert run(logits, params)[0] == [20, 20, 30]


def test_other_types_and_shapes_of_arguments_are_refused() -> None:
    one = SamplingParams()
    good, logits, places = shapes_of([one]), torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64)
    for bad in (
        replace(good, top_ps=good.top_ps.double()),
        replace(good, biases=good.biases[:, :5]),
        shapes_of([one, one]),
    ):
        with pytest.raises(ValueError, match="must be contiguous"):
            sample_shaped(logits, torch.zeros(1), places, places, bad, places.clone())
