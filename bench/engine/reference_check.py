"""The linears of a layer at each rung against float32: what the kernel adds, and what quantizing adds."""

from __future__ import annotations

from typing import Any

import torch
from bench_setup import Bench
from torch import Tensor

from morph_runtime.weights.bound import BoundLinear

KERNEL_BAR = 1e-2
"""||found - wanted|| / ||wanted|| that a kernel may have on the values that it multiplies; bf16 results have 2e-3."""


def check(bench: Bench) -> list[dict[str, Any]]:
    """Relative errors by rung, linear and rows: `kernel`, against float32 with the same weights and activations;
    `w_fp32_x`, with the same weights but activations that are not quantized; `full`, with the full precision's weights.

    Raises:
        RuntimeError: a kernel is wrong.
    """
    engine = bench.engine
    engine.set_level(0)
    exact = [linear.dequantize() for linear in engine.parts.swapper.layers[0].linears]
    rows, wrong = [], []
    for rung, level in bench.levels.items():
        engine.set_level(level)
        for linear, full in zip(engine.parts.swapper.layers[0].linears, exact, strict=True):
            values = linear.dequantize()
            for count in bench.scale.check_rows:
                row = {
                    "rung": rung, "linear": linear.shape.name, "kernel": linear.kernel.name, "rows": count,
                    **errors(linear, values, full, count),
                }  # fmt: skip
                rows.append(row)
                if not row["error_kernel"] <= KERNEL_BAR:
                    wrong.append(row)
    engine.set_level(0)
    if wrong:
        raise RuntimeError(f"kernels are wrong: {wrong}")
    return rows


@torch.inference_mode()
def errors(linear: BoundLinear, values: Tensor, full: Tensor, count: int) -> dict[str, float]:
    """Of one linear; values and full are float32 [N, K], count the rows of x."""
    kernel, device = linear.kernel, values.device
    generator = torch.Generator(device).manual_seed(count)
    x = torch.randn(count, values.shape[1], generator=generator, device=device).to(kernel.dtype)
    scratch = torch.empty(max(64, kernel.scratch_bytes(linear.shape)), dtype=torch.uint8, device=device)
    seen = x.float()
    if kernel.wants_fp8(count):
        from morph_runtime.kernels.cuda.fused import quantize_rows  # there are such kernels on a GPU alone

        quantized = quantize_rows(x)
        found = kernel.run_fp8(quantized, linear.tensors, scratch)
        seen = quantized.values.float() * quantized.scales
    else:
        found = kernel.run(x, linear.tensors, scratch)
    exact = x.float()
    return {
        "error_kernel": relative(found, seen @ values.t()),
        "error_w_fp32_x": relative(found, exact @ values.t()),
        "error_full": relative(found, exact @ full.t()),
    }


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||"""
    return float((found.float() - wanted).norm() / wanted.norm())
