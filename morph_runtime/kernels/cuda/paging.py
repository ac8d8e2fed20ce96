"""Where a tile of tokens lies in the paged cache: what both attention kernels do for each tile.

Tiles begin at multiples of their size. Where a tile is made of whole blocks, all that depends on a token's place in its
block is the same for every tile, and the compiler takes it out of the loop: a fifth of its instructions reckoned
addresses before, which took 4 to 6 % of a prompt's attention (bench/gpu_kernels).
"""

from __future__ import annotations

import triton.language as tl

from morph_runtime.kernels.cuda.jit import kernel


@kernel
def block_numbers(
    table: tl.tensor, tile: tl.tensor, lane: tl.tensor, mask: tl.tensor, TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr
) -> tl.tensor:
    """The block of each of a tile's tokens, int32 [TILE]; 0 where `mask` is not set. `lane` counts the tokens."""
    if TILE % BLOCK_TOKENS == 0:
        entry = tile // BLOCK_TOKENS + lane // BLOCK_TOKENS
    else:
        entry = (tile + lane) // BLOCK_TOKENS
    return tl.load(table + entry, mask=mask, other=0)


@kernel
def place_in_block(tile: tl.tensor, lane: tl.tensor, TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr) -> tl.tensor:
    """The place of each of a tile's tokens in its block, int32 [TILE]."""
    if TILE % BLOCK_TOKENS == 0:
        place = lane % BLOCK_TOKENS
    else:
        place = (tile + lane) % BLOCK_TOKENS
    return place


@kernel
def for_cache(query: tl.tensor, cache: tl.tensor) -> tl.tensor:
    """The queries, in the type to multiply in: float16 beside an FP8 cache of bfloat16 queries, else their own.

    A GPU turns FP8 into float16 in one instruction, into bfloat16 in several (bench/gpu_kernels has what it takes).
    """
    if cache.dtype.element_ty.primitive_bitwidth == 8 and query.dtype == tl.bfloat16:
        query = tl.clamp(query.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return query
