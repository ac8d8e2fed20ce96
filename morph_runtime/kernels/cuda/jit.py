"""The decorator of this folder's kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton


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
