"""Blocks of a cache that is larger than 2^31 words move as small ones do."""

from __future__ import annotations

import pytest
import torch

from morph_runtime.kv import KVCache, KVLayout

EXTENT = 64 << 20
BLOCKS = 8320
"""Of 2 MiB each (Llama-3-8B's shape): word 2^31 is the first of block 8192."""


def test_pairs_arrive_in_order_however_fast_they_follow_each_other() -> None:
    from morph_runtime.engine.cuda_send import PAIRS, PairSender

    sender = PairSender(torch.device("cuda", 0))
    torch.cuda._sleep(50_000_000)  # the kernels that read the buffers begin late
    wanted = [
        [(at + 7 * turn, -at) for at in range(count)] for turn, count in enumerate((1, 3, PAIRS, 5, PAIRS + 1, 2))
    ]
    found = [sender.send(pairs) for pairs in wanted]
    assert [tensor.tolist() for tensor in found] == [[list(pair) for pair in pairs] for pairs in wanted]


def test_blocks_beyond_two_to_the_31_words_move_whole() -> None:
    from morph_runtime.engine.cuda_send import PairSender
    from morph_runtime.memory.cuda import CudaPageArena

    layout = KVLayout(32, 8, 128, 16, torch.bfloat16, 0, 64)
    assert layout.range_block_bytes == 2 << 20
    quantum = layout.quantum(EXTENT)
    extents = -(-BLOCKS // quantum.blocks) * quantum.extents + 1
    if torch.cuda.mem_get_info()[0] < (extents + 16) * EXTENT:
        pytest.skip("needs 18 GiB of free GPU memory")
    arena = CudaPageArena(extents, EXTENT)
    try:
        cache = KVCache(arena, layout, BLOCKS, zeroed=False, send=PairSender(torch.device("cuda", 0)).send)
        cache.grow(cache.max_blocks // cache.quantum_blocks)
        high, low = list(range(8180, 8216)), list(range(36))
        for block in (*high, *low, *range(40, 76), *range(8240, 8276)):
            for layer in (0, 17, 31):
                cache.k(layer)[block].fill_(block % 97 + layer)
                cache.v(layer)[block].fill_(-(block % 89) - layer)
        for sources, targets in ((high, list(range(40, 76))), (low, list(range(8240, 8276)))):
            assert cache.digest(sources) != cache.digest(targets)
            cache.copy_blocks(list(zip(sources, targets, strict=True)))
            assert cache.digest(sources) == cache.digest(targets)
            assert float(cache.k(17)[targets[-1]].float().mean()) == sources[-1] % 97 + 17
        assert float(cache.k(31)[high[20]].float().mean()) == high[20] % 97 + 31, "a source stays as it is"
    finally:
        arena.close()
