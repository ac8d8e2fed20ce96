"""What every linear kernel here asks of the GPU and of its arguments."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from morph_runtime.kernels.cuda.tiles import Tile

SHARED_EVERYWHERE = 90 << 10
"""Bytes of shared memory that a block gets on every GPU from SM80 on."""

ROW_SCALES = (8, 9, 10)
"""Major compute capabilities whose FP8 product in PyTorch takes a scale per row."""

SHARED_SPARE = 4 << 10
"""Bytes beside the stages: scales, barriers, reductions."""


def check_gpu(dtype: torch.dtype, device: torch.device, capability: tuple[int, int]) -> str:
    """Why a kernel that needs this compute capability cannot serve, or an empty text."""
    if device.type != "cuda":
        return f"it runs on cuda, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"it serves bfloat16 and float32, not {dtype}"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return f"it needs compute capability {capability[0]}.{capability[1]}, this GPU has {found[0]}.{found[1]}"
    return ""


@cache
def has_scaled_mm(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` takes a scale per row there. On SM110 and SM120 PyTorch 2.10 hands it to cuBLASLt,
    which does not (PyTorch's issue 192707)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in ROW_SCALES


def check_rows(x: Tensor, k: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless x is [M, k], contiguous and of `dtype`."""
    if x.dim() != 2 or x.shape[1] != k or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"x must be contiguous [M, {k}] of {dtype}, not {tuple(x.shape)} of {x.dtype}")


def check_weight(weight: Tensor, n: int, k: int, first_row: int) -> None:
    """Raise ValueError unless weight is contiguous [rows, k] and its rows lie within the linear's n."""
    rows = weight.shape[0]
    if weight.dim() != 2 or weight.shape[1] != k or not weight.is_contiguous() or first_row + rows > n:
        raise ValueError(f"rows {tuple(weight.shape)} from {first_row} on do not fit a linear of {n} x {k}")


def exchange(scratch: Tensor, locks: Tensor, tile: Tile, m: int, n: int) -> tuple[Tensor, bool]:
    """Where the splits of a tile leave their sums, float32 over uint8 `scratch`, and whether there are any."""
    if tile.splits == 1:
        return locks, False
    size = tile.partial_bytes(m, n)
    tiles_m, tiles_n, _ = tile.grid(m, n)
    if scratch.numel() < size or locks.shape[0] < tiles_m * tiles_n:
        raise ValueError(
            f"{m} rows split into {tile} need a scratch of {size} bytes, not {scratch.numel()}, "
            f"and {tiles_m * tiles_n} locks, not {locks.shape[0]}"
        )
    return scratch[:size].view(torch.float32), True


def fitted(tile: Tile, x: Tensor, weight_bytes: float) -> Tile:
    """The tile with as many pipeline stages as the shared memory of x's GPU holds; weight_bytes: of one code."""
    stage = int(tile.bk * (tile.bm * x.itemsize + tile.bn * weight_bytes))
    if not x.is_cuda or tile.stages * stage <= SHARED_EVERYWHERE:
        return tile
    properties = torch.cuda.get_device_properties(x.device)
    limit = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block) - SHARED_SPARE
    return replace(tile, stages=max(2, min(tile.stages, limit // stage)))
