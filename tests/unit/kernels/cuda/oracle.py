"""Slow and plain: what the GPU's kernels must compute, and paged caches to compute it over."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from morph_runtime.engine.messages import SamplingParams

NEAR = 1e-5
"""Of a sum of probabilities in float32."""


@dataclass(frozen=True)
class Paged:
    """A cache whose blocks outside of the tables, and slots behind each context, hold NaN."""

    k: Tensor  # [blocks, block_tokens, kv_heads, head_dim]
    v: Tensor
    tables: Tensor  # int32 [S, max_blocks]; -1 behind the last block
    contexts: Tensor  # int32 [S]


def paged(
    contexts: list[int],
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    device: str = "cpu",
    planes: int = 2,
    plane: int = 0,
    window: int = 0,
    spare: int = 3,
    seed: int = 0,
) -> Paged:
    """A cache with shuffled blocks, K and V being planes of one range that holds several layers' planes."""
    generator = torch.Generator(device).manual_seed(seed)
    needs = [-(-context // block_tokens) for context in contexts]
    blocks = sum(needs) + spare
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.full((len(contexts), max([*needs, 1]) + 1), -1, dtype=torch.int32)
    span = torch.full((blocks, planes, block_tokens, kv_heads, head_dim), torch.nan, device=device).to(dtype)
    for row, (context, need) in enumerate(zip(contexts, needs, strict=True)):
        for index in range(need):
            block = order.pop()
            if window and (index + 1) * block_tokens <= context - window:
                continue  # given back: nobody sees it any more
            tables[row, index] = block
            used = min(context - index * block_tokens, block_tokens)
            fresh = torch.randn(2, used, kv_heads, head_dim, generator=generator, device=device)
            span[block, plane : plane + 2, :used] = fresh.to(dtype)
    return Paged(
        span[:, plane],
        span[:, plane + 1],
        tables.to(device),
        torch.tensor(contexts, dtype=torch.int32, device=device),
    )


def gathered(cache: Tensor, table: Tensor, context: int) -> Tensor:
    """A sequence's keys or values in order, float32 [context, kv_heads, head_dim]."""
    block_tokens = cache.shape[1]
    blocks = table[: -(-context // block_tokens)].long().clamp(min=0)
    return cache[blocks].flatten(0, 1)[:context].float()


def attention(q: Tensor, cache: Paged, starts: list[int], scale: float, window: int = 0) -> Tensor:
    """Dense softmax in float32; q [T, heads, head_dim], starts [S + 1] -> [T, heads * head_dim]."""
    out = torch.zeros(q.shape, device=q.device)
    for row, context in enumerate(cache.contexts.tolist()):
        first, last = starts[row], starts[row + 1]
        if not context or first == last:
            continue
        group = q.shape[1] // cache.k.shape[2]
        k, v = (gathered(part, cache.tables[row], context).repeat_interleave(group, 1) for part in (cache.k, cache.v))
        query = torch.arange(context - (last - first), context, device=q.device)[:, None]
        key = torch.arange(context, device=q.device)[None]
        seen = key <= query
        if window:
            seen &= key > query - window
        # What nobody sees may be NaN, also where it meets a weight of 0.
        k, v = (torch.where(seen.any(0)[:, None, None], part, 0) for part in (k, v))
        score = torch.einsum("qhd,khd->hqk", q[first:last].float(), k) * scale
        weight = score.masked_fill(~seen, float("-inf")).softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weight, v)
    return out.flatten(1)


def kept_by(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Which tokens of scores [vocab] must stay, and which may: they differ where float32 cannot tell. Equals stay."""
    exact = scores.double() / params.temperature
    must = may = exact > float("-inf")
    if params.min_p:
        bound = exact.max() + log(params.min_p)
        must, may = must & (exact >= bound + NEAR), may & (exact >= bound - NEAR)
    if 0 < params.top_k < len(exact):
        largest = exact >= exact.topk(params.top_k).values[-1]
        must, may = must & largest, may & largest
    if params.top_p < 1:
        probabilities = exact.masked_fill(~may, float("-inf")).softmax(0)
        ordered, index = probabilities.sort(descending=True)
        above = ordered.cumsum(0) - ordered
        above = above[torch.searchsorted(-ordered, -ordered)]  # the first of equals speaks for all
        before = torch.empty_like(above).scatter_(0, index, above)
        must, may = must & (before < params.top_p - NEAR), may & (before < params.top_p + NEAR)
    return must, may
