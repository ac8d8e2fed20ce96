"""The prefix cache: full KV blocks, found again by the tokens up to their end.

The index is a tree. A node stands for all tokens up to the end of one block; a node's children are
keyed by the tokens of the block that follows. So hashes are chained along the path, and each lookup
compares the tokens themselves: two prompts never share a block because their hashes agree.

Keys and values depend on all that was computed before them, so the precision of a block is that of its
whole prefix: the deepest level at which any token up to the block's end was computed. `cache.reuse`
says which blocks a request that is admitted at a level may take:

* `exact`: those whose prefix was computed wholly at this level. The output is what it would be without
  the cache. A node may have one block for each level.
* `at_least`: this level or milder ones. Quality is at least that of computing anew.
* `any`: all. A request at full precision may then read keys and values of quantized layers.

With the last two a node has one block, the mildest seen. The cache owns no memory: it marks blocks of
the pool as kept, and the pool tells when it evicts one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from morph_runtime.config import CacheSettings
from morph_runtime.errors import IntegrityError
from morph_runtime.kv import BlockPool

NOTHING = -1
"""Level of a prefix of no tokens."""


@dataclass(eq=False, slots=True)
class Node:
    """All tokens up to the end of one block.

    Attributes:
        parent: the prefix without that block; None for the root and for nodes taken out of the tree.
        tokens: the tokens of that block.
        children: longer prefixes, by the tokens of their last block.
        blocks: cached or live KV blocks with this content, by level.
        cursors: requests that stand here.
    """

    parent: Node | None
    tokens: tuple[int, ...]
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)
    cursors: int = 0


@dataclass(eq=False, slots=True)
class Cursor:
    """How far a request's computed tokens stand in the tree.

    Attributes:
        node: the prefix of its first `blocks` blocks.
        blocks: blocks that are in the tree or need not be.
        level: the deepest level of any of its computed tokens.
        mixed: whether they were computed at several levels.
        reused: tokens that it found here and did not compute.
        clean: computed tokens before the first one that was computed at a level below full precision, or after one.
    """

    node: Node
    blocks: int = 0
    level: int = NOTHING
    mixed: bool = False
    reused: int = 0
    clean: int = sys.maxsize


@dataclass(frozen=True, slots=True)
class Hit:
    """The longest reusable prefix of a request."""

    node: Node
    blocks: tuple[int, ...]
    level: int


class PrefixCache:
    """The index over the pool's kept blocks. With `cache.prefix` off it finds and records nothing."""

    def __init__(self, settings: CacheSettings, pool: BlockPool, block_tokens: int) -> None:
        """Becomes the pool's one listener to evictions."""
        self._enabled = settings.prefix
        self._exact = settings.reuse == "exact"
        self._any = settings.reuse == "any"
        self._pool = pool
        self._block_tokens = block_tokens
        self._root = Node(None, ())
        self._entries: dict[int, tuple[Node, int]] = {}
        pool.on_evict(self._evicted)

    def find(self, tokens: Sequence[int], level: int) -> Hit:
        """The blocks that a request at `level` may take; never the one of its last token, which must be computed."""
        node, blocks, deepest = self._root, list[int](), NOTHING
        size = self._block_tokens
        for first in range(0, len(tokens) - size, size) if self._enabled else ():
            child = node.children.get(tuple(tokens[first : first + size]))
            found = None if child is None else self._reusable(child, level)
            if child is None or found is None:
                break
            node = child
            blocks.append(child.blocks[found])
            deepest = max(deepest, found)
        return Hit(node, tuple(blocks), deepest)

    def take(self, hit: Hit) -> Cursor:
        """Hold the blocks of a hit; where the request goes on from there."""
        self._pool.share(hit.blocks)
        hit.node.cursors += 1
        reused = len(hit.blocks) * self._block_tokens
        return Cursor(hit.node, len(hit.blocks), hit.level, False, reused, reused if hit.level > 0 else sys.maxsize)

    def record(
        self, cursor: Cursor, tokens: Sequence[int], blocks: Sequence[int], computed: int, level: int, new: int = 1
    ) -> None:
        """Note that more tokens of a request were computed, at `level`; blocks that are full now can be found.

        Args:
            cursor: of the request.
            tokens: all that it has.
            blocks: its block table.
            computed: leading tokens whose keys and values are in these blocks.
            level: at which those were computed that are new since the last call.
            new: how many of them the last step has computed.
        """
        if cursor.level != level:
            if level > 0:
                cursor.clean = min(cursor.clean, computed - new)
            cursor.mixed = cursor.mixed or cursor.level != NOTHING
            cursor.level = max(cursor.level, level)
        size = self._block_tokens
        if (cursor.blocks + 1) * size > computed or not self._enabled or (self._exact and cursor.mixed):
            return
        start = cursor.node
        while (cursor.blocks + 1) * size <= computed:
            first = cursor.blocks * size
            key = tuple(tokens[first : first + size])
            child = cursor.node.children.get(key)
            if child is None:
                child = cursor.node.children[key] = Node(cursor.node, key)
            self._offer(child, blocks[cursor.blocks], cursor.level)
            cursor.node = child
            cursor.blocks += 1
        cursor.node.cursors += 1
        start.cursors -= 1

    def leave(self, cursor: Cursor) -> None:
        """The request gives its blocks up; the cursor is not used again."""
        cursor.node.cursors -= 1
        self._prune(cursor.node)

    def remap(self, mapping: Mapping[int, int]) -> None:
        """Follow blocks that have moved (old id -> new id)."""
        moved = {new: self._entries.pop(old) for old, new in mapping.items() if old in self._entries}
        for new, (node, level) in moved.items():
            node.blocks[level] = new
        self._entries.update(moved)

    def check_integrity(self) -> None:
        """Index, tree and pool agree: each block of the tree is kept, once, and no node is there for nothing.

        Raises:
            IntegrityError: they do not.
        """
        seen: dict[int, tuple[Node, int]] = {}
        todo = [self._root]
        while todo:
            node = todo.pop()
            todo.extend(node.children.values())
            seen.update({block: (node, level) for level, block in node.blocks.items()})
            if node is not self._root and not (node.children or node.blocks or node.cursors):
                raise IntegrityError("A prefix is in the tree though nothing is cached for it.")
        if seen != self._entries:
            raise IntegrityError("The prefix tree and the index of its blocks do not agree.")
        if any(not self._pool.is_kept(block) for block in seen):
            raise IntegrityError("A KV block of the prefix tree is not kept by the pool.")

    def _reusable(self, node: Node, level: int) -> int | None:
        """The level of the node's block that a request at `level` may take."""
        if self._exact:
            return level if level in node.blocks else None
        mildest = min(node.blocks, default=None)
        return mildest if mildest is not None and (self._any or mildest <= level) else None

    def _offer(self, node: Node, block: int, level: int) -> None:
        """Keep this block for the node unless what is there serves as well; it may replace a deeper one."""
        if self._exact:
            if level in node.blocks:
                return
        else:
            for worse, there in tuple(node.blocks.items()):
                if worse <= level:
                    return
                del node.blocks[worse], self._entries[there]
                self._pool.forget(there)
        node.blocks[level] = block
        self._entries[block] = (node, level)
        self._pool.keep(block)

    def _evicted(self, block: int) -> None:
        node, level = self._entries.pop(block)
        del node.blocks[level]
        self._prune(node)

    def _prune(self, node: Node) -> None:
        """Take nodes out of the tree that nothing needs any more, from this one upwards."""
        while node.parent is not None and not (node.children or node.blocks or node.cursors):
            parent = node.parent
            del parent.children[node.tokens]
            node.parent = None
            node = parent
