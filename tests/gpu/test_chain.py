from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cuda.oracle import paged

pytest.importorskip("triton")
from morph_runtime.kernels.cuda import fused
from morph_runtime.kernels.cuda.attention_decode import allocate_workspace, decode, decode_splits
from morph_runtime.kernels.cuda.rope import rope_store
from morph_runtime.kernels.rope import RopeSpec, RopeTable


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_kernels_whose_launches_overlap_see_what_the_ones_before_them_wrote(rows: int) -> None:
    """Layers of small kernels, each fed by the one before: a captured run equals one that stops after each kernel."""
    heads, kv_heads, dim, layers = 32, 8, 128, 12
    cache = paged([257] * rows, kv_heads, dim, 16, torch.bfloat16, "cuda")
    k_start, v_start = cache.k.clone(), cache.v.clone()
    positions = cache.contexts.long() - 1
    slots = cache.tables.gather(1, (positions // 16)[:, None])[:, 0] * 16 + positions % 16
    table = RopeTable(RopeSpec(), dim, 512, torch.bfloat16)._table.cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    start = torch.randn(rows, heads * dim, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(heads * dim, device="cuda", generator=generator).bfloat16()
    splits = decode_splits(rows, kv_heads, 512, 132)
    workspace = allocate_workspace(rows, heads, dim, splits, start.device)
    hidden = torch.empty_like(start)
    k, v = cache.k, cache.v

    def run(stop: bool) -> Tensor:
        def done() -> None:
            if stop:
                torch.cuda.synchronize()

        hidden.copy_(start)
        k.copy_(k_start)
        v.copy_(v_start)
        delta: Tensor | None = None
        for _ in range(layers):
            x = fused.add_norm(hidden, delta, weight, 1e-5)
            assert isinstance(x, Tensor)
            done()
            qkv = torch.cat((x, x[:, : 2 * kv_heads * dim]), 1)
            rope_store(qkv, positions, slots, table, k, v, heads, kv_heads, dim)
            done()
            mixed = torch.empty_like(x)
            q = qkv[:, : heads * dim].unflatten(1, (heads, dim))
            decode(q, k, v, cache.tables, cache.contexts, mixed, workspace, splits=splits, scale=dim**-0.5)
            done()
            rows8 = fused.quantize_rows(mixed)
            done()
            x = fused.add_norm(hidden, (rows8.values.float() * rows8.scales).bfloat16(), weight, 1e-5)
            assert isinstance(x, Tensor)
            done()
            activated = fused.swiglu(torch.cat((x, x), 1))
            assert isinstance(activated, Tensor)
            delta = activated
            done()
        return hidden.clone()

    expected = run(stop=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(stop=False)
    for _ in range(20):
        graph.replay()
        assert torch.equal(result, expected)
    assert torch.equal(run(stop=False), expected)
