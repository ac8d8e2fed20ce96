"""What the kernels ask of a layer's part of the paged KV cache."""

from __future__ import annotations

from torch import Tensor


def check_cache(k_cache: Tensor, v_cache: Tensor, kv_heads: int, head_dim: int) -> int:
    """Make sure that a layer's K and V are what the kernels can address.

    Args:
        k_cache: [blocks, block_tokens, kv_heads, head_dim]; the last stride is 1, the others are free.
        v_cache: as `k_cache`, same strides.
        kv_heads: heads of the model.
        head_dim: of the model.

    Returns:
        Tokens per block.

    Raises:
        ValueError: they are not.
    """
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.dtype != v_cache.dtype:
        raise ValueError("K and V of the cache must have one shape, one type and the same strides.")
    if k_cache.dim() != 4 or k_cache.shape[2:] != (kv_heads, head_dim) or k_cache.stride(3) != 1:
        raise ValueError(
            f"The cache is {tuple(k_cache.shape)} with strides {k_cache.stride()}: it must be "
            f"[blocks, block_tokens, {kv_heads}, {head_dim}] with contiguous heads."
        )
    return k_cache.shape[1]
