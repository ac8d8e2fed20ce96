"""Which linear kernels there are, and which one serves a linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.full_torch import TorchLinear
from morph_runtime.kernels.int4_cpu import AtenInt4Linear, NibbleLinear
from morph_runtime.kernels.int8_cpu import AtenInt8Linear, Int8Linear
from morph_runtime.kernels.linear import LinearKernel, LinearShape
from morph_runtime.kernels.rung import Rung

KERNELS: Sequence[type[LinearKernel]] = (TorchLinear, AtenInt8Linear, Int8Linear, AtenInt4Linear, NibbleLinear)
"""All kernels of the CPU; of one rung, the better comes first."""


def known(device: torch.device) -> Sequence[type[LinearKernel]]:
    """The kernels of a kind of device; those of a GPU need Triton's language, so they are imported when asked for."""
    if device.type != "cuda":
        return KERNELS
    from morph_runtime.kernels.cuda.linears import CUDA_KERNELS

    return CUDA_KERNELS


def select(rung: Rung, shape: LinearShape, dtype: torch.dtype, device: torch.device, forced: str = "") -> LinearKernel:
    """The first kernel of `rung` that can serve `shape`, or the one named `forced`.

    Raises:
        ConfigError: none fits, or `forced` is unknown or does not fit; the text lists every reason.
    """
    candidates = [kernel for kernel in known(device) if kernel.rung == rung]
    if forced:
        names = ", ".join(kernel.name for kernel in candidates)
        candidates = [kernel for kernel in candidates if kernel.name == forced]
        if not candidates:
            raise ConfigError(f"kernels.{rung} names an unknown kernel '{forced}'; known are: {names}.")
    reasons = []
    for kernel in candidates:
        fits, reason = kernel.can_implement(shape, dtype, device)
        if fits:
            return kernel(dtype)
        reasons.append(f"{kernel.name}: {reason}")
    raise ConfigError(
        f"No {rung} kernel can serve the linear '{shape.name}' ({shape.out_features} x {shape.in_features}): "
        f"{'; '.join(reasons)}."
    )
