"""The decorator of this folder's kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function in Triton's language at its first call, once per kind of argument."""
    return triton.jit(function)


def kernel_with_varying(names: Sequence[str]) -> Callable[[Callable[..., Any]], Any]:
    """As `kernel`, but the integers of these names vary from call to call: no version is compiled per value."""

    def decorate(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=list(names))

    return decorate


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


@kernel
def follow() -> None:
    """Let the next kernel take its place on the processors early, and wait for the kernel before.

    First in each kernel launched with `overlap_options`. A kernel that waits ends after the one before it, so what
    all earlier kernels wrote is there too.
    """
    gdc_launch_dependents()
    gdc_wait()


@kernel
def lead() -> None:
    """Let the next kernel, if it begins with `follow`, take its place on the processors early."""
    gdc_launch_dependents()


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch can overlap with the kernel before it (programmatic dependent launch: Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap_options(overlap: bool) -> dict[str, Any]:
    """Options of a launch whose kernel begins with `follow` if `overlap`."""
    return {"launch_pdl": True} if overlap else {}
