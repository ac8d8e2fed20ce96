"""KV block ids: who holds them, how many there are, and how the highest are vacated.

A block is *live* (somebody holds it), *cached* (nobody does, but its content may be wanted again) or
*free*. Blocks carry reference counts, so that requests may share them. The lowest free id is handed
out first, so the tail, which a shrink takes away, drains by itself; when none is free, the block that
has been cached longest is evicted.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from morph_runtime.errors import IntegrityError, MorphError


class NoFreeBlocks(MorphError):
    """Fewer blocks are free than asked for. Nothing was taken."""


class CannotShrink(MorphError):
    """More blocks are live than would remain. Nothing has changed."""


class BlockPool:
    """Ids 0..capacity-1. During a shrink, live ids at or above the capacity await migration."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._mapped = capacity
        self._free = list(range(capacity))
        self._references: dict[int, int] = {}
        self._kept: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._moving: dict[int, int] = {}
        self._on_evict: Callable[[int], None] = lambda block: None

    @property
    def capacity(self) -> int:
        """Blocks that may be live."""
        return self._capacity

    @property
    def num_used(self) -> int:
        """Live blocks."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: the free ones and, since they can be evicted, the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content is kept for now."""
        return len(self._cached)

    @property
    def free_tail(self) -> int:
        """How many of the highest ids are free: they can be given up without a migration or an eviction."""
        return self._capacity - 1 - max((*self._references, *self._cached), default=-1)

    def holders(self, block: int) -> int:
        """References to a block; 0 unless it is live."""
        return self._references.get(block, 0)

    def is_kept(self, block: int) -> bool:
        """Whether the block's content outlives its last holder."""
        return block in self._kept

    def on_evict(self, callback: Callable[[int], None]) -> None:
        """Have `callback` called with each kept block whose content is about to be lost."""
        self._on_evict = callback

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks: free ones, the lowest ids first, then cached ones, the oldest first.

        Raises:
            NoFreeBlocks: fewer are free or cached; nothing was taken.
        """
        if count > self.num_free:
            raise NoFreeBlocks(f"{count} KV blocks are needed, {self.num_free} are free.")
        taken = [self._take() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of these live or cached blocks.

        Raises:
            IntegrityError: one of them is neither.
        """
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
            elif block not in self._references:
                raise IntegrityError(f"KV block {block} is shared but not live.")
            self._references[block] = self._references.get(block, 0) + 1

    def keep(self, block: int) -> None:
        """Cache this live block once nobody holds it, until its room is needed.

        Raises:
            IntegrityError: it is not live.
        """
        if block not in self._references:
            raise IntegrityError(f"KV block {block} is kept but not live.")
        self._kept.add(block)

    def forget(self, block: int) -> None:
        """The content of a kept block is no longer wanted; without a holder it is free at once. Not told of."""
        self._kept.discard(block)
        if block in self._cached:
            del self._cached[block]
            heapq.heappush(self._free, block)

    def free(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each, in this order; those without any are cached if they are kept, else free.

        Raises:
            IntegrityError: one of them is not live.
        """
        for block in blocks:
            count = self._references.get(block, 0)
            if count == 0:
                raise IntegrityError(f"KV block {block} is freed but not live.")
            if count > 1:
                self._references[block] = count - 1
                continue
            del self._references[block]
            if block >= self._capacity:
                self._evict(block)
            elif block in self._kept:
                self._cached[block] = None
            else:
                heapq.heappush(self._free, block)

    def grow(self, capacity: int) -> None:
        """Publish more blocks; their memory must be there.

        Raises:
            IntegrityError: it is less than there are, or a shrink is under way.
        """
        if capacity < self._capacity or self._mapped != self._capacity:
            raise IntegrityError(f"The KV capacity cannot grow from {self._capacity} to {capacity}.")
        self._free.extend(range(self._capacity, capacity))  # a heap still: each is greater than all before it
        self._capacity = self._mapped = capacity

    def is_live_from(self, block: int) -> bool:
        """Whether any id from this one on is live, and would have to move if the capacity were lowered to it."""
        return max(self._references, default=-1) >= block

    def reserve_below(self, capacity: int) -> None:
        """Begin a shrink: cached blocks at or above `capacity` are evicted, and no such id is given out any more.

        Raises:
            CannotShrink: more blocks are live than would remain; nothing has changed.
            IntegrityError: it is no shrink, or one is under way.
        """
        if not 0 <= capacity <= self._capacity or self._mapped != self._capacity:
            raise IntegrityError(f"The KV capacity cannot shrink from {self._capacity} to {capacity}.")
        if self.num_used > capacity:
            raise CannotShrink(f"{self.num_used} KV blocks are live, but only {capacity} would remain.")
        self._capacity = capacity
        for block in [block for block in self._cached if block >= capacity]:
            del self._cached[block]
            self._evict(block)
        self._free = [block for block in self._free if block < capacity]
        heapq.heapify(self._free)

    def plan_migration(self) -> list[tuple[int, int]]:
        """Where the live blocks of the tail go: (old id, new id). The new ids are taken, evicting as `allocate` does.

        Raises:
            CannotShrink: too few blocks below are free (they were taken since); the shrink is called off.
            IntegrityError: a plan is under way.
        """
        if self._moving:
            raise IntegrityError("A migration of KV blocks is planned already.")
        tail = sorted(block for block in self._references if block >= self._capacity)
        if len(tail) > self.num_free:
            live, capacity = self.num_used, self._capacity
            self.cancel_shrink()
            raise CannotShrink(f"{live} KV blocks are live, but only {capacity} would remain.")
        self._moving = {block: self._take() for block in tail}
        return list(self._moving.items())

    def commit_migration(self, pairs: Sequence[tuple[int, int]]) -> None:
        """End the shrink: contents and block tables have moved. A block freed since the plan just stays free.

        Kept blocks stay kept under their new ids; who indexes them does so under these from now on.

        Raises:
            IntegrityError: these are not the pairs of the plan, or a block of the tail is live without one;
                nothing has changed.
        """
        missed = self.is_live_from(self._capacity) and any(
            block >= self._capacity and block not in self._moving for block in self._references
        )
        if dict(pairs) != self._moving or missed:
            raise IntegrityError("A shrink of the KV cache ends without the migration that it needs.")
        for old, new in pairs:
            if old in self._references:
                self._references[new] = self._references.pop(old)
                if old in self._kept:
                    self._kept.remove(old)
                    self._kept.add(new)
            else:
                heapq.heappush(self._free, new)
        self._moving = {}
        self._mapped = self._capacity

    def cancel_shrink(self) -> None:
        """Call a shrink off, planned or not: no block has moved, the tail is given out again."""
        for new in self._moving.values():
            heapq.heappush(self._free, new)
        self._moving = {}
        for block in range(self._capacity, self._mapped):
            if block not in self._references:
                heapq.heappush(self._free, block)
        self._capacity = self._mapped

    def check_integrity(self) -> None:
        """Free, cached and live ids and targets of a migration are disjoint and together make up the capacity.

        Raises:
            IntegrityError: they do not.
        """
        live = [block for block in self._references if block < self._capacity]
        if sorted([*self._free, *self._cached, *self._moving.values(), *live]) != list(range(self._capacity)):
            raise IntegrityError(
                f"{len(self._free)} free, {self.num_cached} cached and {self.num_used} live KV blocks do not make up "
                f"the capacity {self._capacity}, each once."
            )
        if not self._cached.keys() <= self._kept or not self._kept <= self._cached.keys() | self._references.keys():
            raise IntegrityError("A cached KV block is not kept, or a kept one is neither cached nor live.")
        if any(block >= self._mapped for block in self._references):
            raise IntegrityError("A live KV block has no memory.")
        if any(count < 1 for count in self._references.values()):
            raise IntegrityError("A KV block has no reference but counts as live.")

    def _take(self) -> int:
        """A free block, or the one that has been cached longest; there is one."""
        if self._free:
            return heapq.heappop(self._free)
        block, _ = self._cached.popitem(last=False)
        self._evict(block)
        return block

    def _evict(self, block: int) -> None:
        """The content of a block without a holder is lost."""
        if block in self._kept:
            self._kept.remove(block)
            self._on_evict(block)
