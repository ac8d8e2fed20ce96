"""The KV resizer: pages that weights gave up become KV blocks, and go back without losing a live block.

Growing publishes capacity last, when the memory is there; shrinking lowers it first, moves live blocks out of
the tail (copy, then patch the block tables), and gives pages back only when the device has done both the copy and the
steps that read the old blocks. Block ids and addresses below the tail never change, so attention
kernels see one growing tensor (DESIGN: page arena).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from morph_runtime.kv import BlockPool, CannotShrink, KVCache
from morph_runtime.memory.arena import PageArena
from morph_runtime.memory.fence import DeviceOrder, Fence


class KVResizer:
    """Changes the KV capacity; keeps `staging_extents` free for the next shift."""

    def __init__(
        self,
        arena: PageArena,
        cache: KVCache,
        pool: BlockPool,
        staging_extents: int,
        remap: Callable[[Mapping[int, int]], None],
        running: Callable[[], int],
        order: DeviceOrder,
    ) -> None:
        """`remap`: patches the block tables; `running`: how many requests hold blocks, and may want another each."""
        self._arena = arena
        self._cache = cache
        self._pool = pool
        self._staging = staging_extents
        self._remap = remap
        self._running = running
        self._order = order
        self._shrinking: tuple[int, Fence] | None = None
        self.has_lent = False
        """Free blocks have been lent to changes and not been taken back."""
        self.blocks_migrated = 0

    @property
    def free_extents(self) -> int:
        """Extents that nothing uses, the staging area among them."""
        return self._arena.free_extents

    @property
    def is_settled(self) -> bool:
        """The KV cache neither grows nor shrinks, and no page is on its way to anywhere."""
        return self._shrinking is None and not self._cache.is_growing and self._arena.is_settled

    def check(self, wait: bool = False) -> None:
        """See what has come of the pages on their way, of weights too.

        Raises:
            OSError: the system does not give one back; it is where it was.
        """
        if wait:
            self._arena.settle()
        else:
            self._arena.check_moves()

    def grow(self, most: int, keep: int = 0) -> int:
        """Turn spare extents into KV blocks, which can be had after `publish`; returns how many. Call after `finish`.

        Args:
            most: blocks to have in the end; the ledger's figure for the level, which leaves room for deeper ones.
            keep: extents to leave free besides the staging area, for changes that follow at once.

        Raises:
            OSError: the system refused a mapping; nothing has changed. It may do so later, too: see `publish`.
        """
        spare = (self._arena.free_extents - self._staging - keep) // self._cache.quantum_extents
        quanta = max(0, min(spare, (most - self._cache.mapped_blocks) // self._cache.quantum_blocks))
        if quanta:
            self._cache.begin_growth(quanta)
        self.has_lent = False
        self.publish()
        return quanta * self._cache.quantum_blocks

    def publish(self, wait: bool = False) -> None:
        """Raise the capacity if the memory of the growth under way has come.

        Raises:
            OSError: the system refused it; nothing has changed since before the growth.
        """
        if self._cache.is_growing and (wait or self._cache.has_grown):
            self._cache.end_growth()
            self._pool.grow(self._cache.mapped_blocks)

    def lower(self, blocks: int, before_move: Callable[[], None] = lambda: None) -> None:
        """Give up all blocks from `blocks`, whole quanta, on; their pages come back with `finish`.

        A block stays free for each request that runs, so that all of them can go on: until each has written a block
        full, none is preempted for what was given up. The scheduler's watermark is not asked for: it bounds what gets
        in, whose prompt has its blocks, and may be less than what runs takes at its next step.

        Args:
            blocks: to remain.
            before_move: called before live blocks move.

        Raises:
            CannotShrink: too many blocks are live; nothing has changed.
        """
        quanta = (self._cache.mapped_blocks - blocks) // self._cache.quantum_blocks
        if quanta <= 0:
            return
        remaining = self._cache.mapped_blocks - quanta * self._cache.quantum_blocks
        live, running = self._pool.num_used, self._running()
        if live + running > remaining:
            raise CannotShrink(f"{live} KV blocks are live and {running} requests run, only {remaining} would remain.")
        if self._pool.is_live_from(remaining):
            before_move()
        self._pool.reserve_below(remaining)
        pairs = self._pool.plan_migration()
        if pairs:
            self._cache.copy_blocks(pairs)
            self._remap(dict(pairs))
            self.blocks_migrated += len(pairs)
        self._pool.commit_migration(pairs)
        self._shrinking = quanta, self._order.fence()

    def lend(self, extents: int) -> None:
        """Give up free blocks of the tail, for so many extents if they suffice; `grow` takes them back.

        At most half of the free tail, so that what runs can go on growing. Nothing moves, nothing is evicted; the pages
        are free after `finish`, as with `lower`.
        """
        if self._cache.is_growing or self._shrinking is not None or extents <= 0:
            return
        blocks, cost = self._cache.quantum_blocks, self._cache.quantum_extents
        quanta = min(-(-extents // cost), self._pool.free_tail // 2 // blocks)
        if quanta:
            self._pool.reserve_below(self._cache.mapped_blocks - quanta * blocks)
            self._pool.commit_migration(self._pool.plan_migration())
            self._shrinking = quanta, self._order.fence()
            self.has_lent = True

    def finish(self, wait: bool = False) -> bool:
        """Give back the pages of a shrink once nothing reads them; True if neither that nor a growth is under way."""
        if self._shrinking is None:
            return not self._cache.is_growing
        quanta, fence = self._shrinking
        if wait:
            fence.wait()
        if not fence.done():
            return False
        self._cache.shrink(quanta)
        self._shrinking = None
        return True
