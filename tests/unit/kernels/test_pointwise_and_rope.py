from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from morph_runtime.kernels.pointwise import FUSED_NORM_MAX_TOKENS, rms_norm, swiglu
from morph_runtime.kernels.rope import RopeSpec, RopeTable, inverse_frequencies


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("tokens", [1, 7, FUSED_NORM_MAX_TOKENS, FUSED_NORM_MAX_TOKENS + 1])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm_equals_its_definition(dtype: torch.dtype, tolerance: float, tokens: int, size: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = ((torch.randn(tokens, 96, generator=generator) + 0.3) * size).to(dtype)
    weight = torch.randn(96, generator=generator).to(dtype)
    wanted = x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-5) * weight.float()
    found = rms_norm(x, weight, 1e-5)
    assert found.is_contiguous() and found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, atol=tolerance * 1e-1, rtol=tolerance * 4)


def test_swiglu_takes_the_gate_first() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    found = swiglu(x)
    torch.testing.assert_close(found, F.silu(x[:, :6]) * x[:, 6:])
    assert found.is_contiguous()


ROPES: list[tuple[RopeSpec, dict[str, Any]]] = [
    (RopeSpec("linear", 10000.0, 4.0), {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    (
        RopeSpec("llama3", 500000.0, 8.0, 8192, 1.0, 4.0),
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    (
        RopeSpec("yarn", 1000000.0, 4.0, 32768, attention_factor=1.1386294),
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    ),
]


@pytest.mark.parametrize("spec,parameters", ROPES)
def test_frequencies_equal_transformers(spec: RopeSpec, parameters: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters
    )
    wanted, factor = ROPE_INIT_FUNCTIONS[spec.kind](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(spec, 128), wanted, atol=0, rtol=1e-6)
    assert factor == pytest.approx(spec.attention_factor)


def test_rotation_equals_the_textbook() -> None:
    table = RopeTable(RopeSpec(), 8, 5000, torch.float32)
    assert table.max_positions == 5000 and table.nbytes == 5000 * 2 * 8 * 4
    positions = torch.tensor([0, 1, 4097, 4999])
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = positions[:, None, None] * inverse_frequencies(RopeSpec(), 8)
    a, b = x.chunk(2, 2)
    wanted = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), 2)
    torch.testing.assert_close(table.rotate(x, *table.lookup(positions)), wanted, atol=1e-5, rtol=1e-5)
