"""Activations in FP8, as the kernels that compute in FP8 take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Fp8Rows(NamedTuple):
    """A matrix [M, K] of FP8 values with a scale for each row: value = values * scale."""

    values: Tensor
    """float8_e4m3fn [M, K], contiguous."""
    scales: Tensor
    """float32 [M, 1]: the largest magnitude of the row / 448."""
