"""Copies by a kernel, in Triton's interpreter; tests/gpu has them in graphs."""

from __future__ import annotations

import pytest
import torch

from morph_runtime.kernels.cuda.fetch import copy_by_kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(7,), (1500,), (6, 32)], ids=str)
def test_a_copy_is_bit_equal_and_writes_nothing_beside_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source = torch.randn(shape).to(dtype)
    source.view(-1)[:3] = torch.tensor([-0.0, float("nan"), float("-inf")])
    size = source.numel()
    room = torch.full((size + 8,), 3.0, dtype=dtype)
    copy_by_kernel(source, room[:size].view(shape))
    assert torch.equal(room[:size].view(torch.uint8), source.view(-1).view(torch.uint8))
    assert room[size:].tolist() == [3.0] * 8


def test_a_copy_to_another_type_or_shape_is_refused() -> None:
    source = torch.zeros(8)
    for target in (torch.zeros(8, dtype=torch.bfloat16), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="cannot go to"):
            copy_by_kernel(source, target)
