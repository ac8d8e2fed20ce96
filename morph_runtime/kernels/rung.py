"""The precisions that a decoder layer can be served at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Rung = Literal["full", "w8", "w4"]

RUNG_BITS: Mapping[Rung, int] = {"full": 16, "w8": 8, "w4": 4}
"""Nominal bits per weight; `full` is 16 for bfloat16 and 32 in float32 equality tests."""

GROUP = 128
"""Weights that share one scale and zero in W4, along the input dimension (AWQ's and GPTQ's usual group)."""
