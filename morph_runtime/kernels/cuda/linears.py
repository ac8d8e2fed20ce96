"""The linear kernels of a GPU; of one rung, the better comes first."""

from __future__ import annotations

from collections.abc import Sequence

from morph_runtime.kernels.cuda.int4 import TritonInt4Linear
from morph_runtime.kernels.cuda.rows import Fp8Linear, TritonInt8Linear
from morph_runtime.kernels.full_torch import TorchLinear
from morph_runtime.kernels.linear import LinearKernel

CUDA_KERNELS: Sequence[type[LinearKernel]] = (TorchLinear, Fp8Linear, TritonInt8Linear, TritonInt4Linear)
