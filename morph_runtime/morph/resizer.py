"""The KV resizer: pages that weights gave up become KV blocks, and go back without losing a live block.

Growing publishes capacity last; shrinking lowers it first, moves live blocks out of the tail (copy,
then patch the block tables), and only then gives pages back. Block ids and addresses below the
tail never change, so attention kernels see one growing tensor (DESIGN: page arena).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from morph_runtime.kv import BlockPool, KVCache
from morph_runtime.memory.arena import PageArena


class KVResizer:
    """Changes the KV capacity; keeps `staging_extents` free for the next shift."""

    def __init__(
        self,
        arena: PageArena,
        cache: KVCache,
        pool: BlockPool,
        staging_extents: int,
        remap: Callable[[Mapping[int, int]], None],
    ) -> None:
        self._arena = arena
        self._cache = cache
        self._pool = pool
        self._staging = staging_extents
        self._remap = remap
        self.blocks_migrated = 0

    def grow(self) -> int:
        """Turn all spare extents into KV blocks; returns the blocks gained."""
        quanta = max(0, self._arena.free_extents - self._staging) // self._cache.quantum_extents
        if quanta:
            self._cache.grow(quanta)
            self._pool.grow(self._cache.mapped_blocks)
        return quanta * self._cache.quantum_blocks

    def make_room(self, target_extents: int, source_extents: int) -> int:
        """Free what an up-shift needs: the target's slot now, and a full staging area once the source is gone.

        Returns:
            the blocks given up.

        Raises:
            CannotShrink: more blocks are live than would remain; nothing has changed.
        """
        needed = max(target_extents, self._staging + target_extents - source_extents)
        missing = needed - self._arena.free_extents
        if missing <= 0:
            return 0
        quanta = -(-missing // self._cache.quantum_extents)
        self._pool.reserve_below(self._cache.mapped_blocks - quanta * self._cache.quantum_blocks)
        pairs = self._pool.plan_migration()
        if pairs:
            self._cache.copy_blocks(pairs)
            self._remap(dict(pairs))
            self.blocks_migrated += len(pairs)
        self._pool.commit_migration(pairs)
        self._cache.shrink(quanta)
        return quanta * self._cache.quantum_blocks
