"""Which tile sizes the products use: a table by the number of rows, found by measurement (bench/gpu_kernels)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log2
from typing import NamedTuple


@dataclass(frozen=True)
class Tile:
    """The configuration of one launch."""

    bm: int
    """Rows of x per tile."""
    bn: int
    """Rows of W per tile."""
    splits: int
    """Programs that share a tile along K."""
    warps: int
    stages: int
    """Depth of the software pipeline."""
    bk: int = 128
    """Step along K; W4's is always one group."""
    mode: str = "whole"
    """W4's way through a group; see `products.int4_product`."""
    wide: bool = False
    """FP8 weights beside full-precision rows: read the codes in wide loads."""

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        """Programs for x [m, K] and W [n, K]."""
        return -(-m // self.bm), -(-n // self.bn), self.splits

    def partial_bytes(self, m: int, n: int) -> int:
        """Bytes that the splits exchange."""
        tiles_m, tiles_n, splits = self.grid(m, n)
        return 4 * tiles_m * self.bm * tiles_n * self.bn * splits if splits > 1 else 0


LOCK_ROWS = 16
"""A linear has a lock per this many rows of W."""

EDGES = (8, 16, 32, 64, 128, 256)
"""The largest numbers of rows of x that one entry of a table serves; more rows take the entry after the last."""


class Choice(NamedTuple):
    """A tile and when to take it."""

    tile: Tile
    """Its splits are chosen per linear."""
    programs: int
    """How many programs are wanted: along K, a tile is split by the power of two that comes nearest."""
    most_tiles: int = 1 << 30
    """Beyond this many tiles the next choice of the entry is looked at."""
    long: int = 1
    """Programs are multiplied by this for long sums."""


Table = Sequence[Sequence[Choice]]
"""One entry per edge and one for more rows. Measured on an H200 (bench/gpu_kernels/README.md)."""

WAVE = 132
"""Tiles that run at once when each fills a multiprocessor of an H200."""

INT4: Table = (
    [Choice(Tile(8, 64, 1, 4, 3, mode="warp"), 450, 264), Choice(Tile(8, 64, 1, 4, 3, mode="warp"), 900)],
    [Choice(Tile(16, 64, 1, 4, 4), 400, 264), Choice(Tile(16, 128, 1, 4, 4), WAVE)],
    [Choice(Tile(32, 64, 1, 4, 4), 320, 264), Choice(Tile(32, 128, 1, 4, 4, mode="halves"), WAVE)],
    [Choice(Tile(64, 64, 1, 4, 3), 300, 264), Choice(Tile(64, 128, 1, 4, 3), WAVE)],
    [
        Choice(Tile(128, 64, 1, 4, 3), 264, 64),
        Choice(Tile(128, 64, 1, 4, 2), 396, 264),
        Choice(Tile(128, 128, 1, 4, 3), WAVE),
    ],
    [Choice(Tile(128, 64, 1, 4, 3), 264, 264), Choice(Tile(128, 128, 1, 4, 3), WAVE)],
    [Choice(Tile(128, 64, 1, 4, 3, mode="halves"), 1, 264), Choice(Tile(128, 128, 1, 4, 3), 1)],
)

FP8: Table = (
    [Choice(Tile(8, 64, 1, 4, 4), 396)],
    [Choice(Tile(16, 64, 1, 4, 4), 330, 264), Choice(Tile(16, 64, 1, 4, 3), WAVE)],
    [Choice(Tile(32, 64, 1, 4, 6), WAVE, 264), Choice(Tile(32, 64, 1, 4, 3), WAVE)],
    [Choice(Tile(64, 64, 1, 4, 6), WAVE, 264), Choice(Tile(64, 64, 1, 4, 3), WAVE)],
    [Choice(Tile(64, 64, 1, 4, 6), WAVE, 264, long=2), Choice(Tile(128, 128, 1, 8, 3), WAVE)],
    [
        Choice(Tile(128, 64, 1, 4, 6), WAVE, WAVE),
        Choice(Tile(128, 128, 1, 8, 6), WAVE, WAVE),
        Choice(Tile(256, 128, 1, 8, 4), 1),
    ],
    [Choice(Tile(128, 128, 1, 8, 3), 1)],
)

ROWS: Table = (
    [Choice(Tile(8, 64, 1, 4, 5), 396)],
    [Choice(Tile(16, 64, 1, 4, 4, wide=True), 400, 264), Choice(Tile(16, 64, 1, 2, 4), WAVE)],
    [Choice(Tile(32, 64, 1, 4, 3, wide=True), 400, 264), Choice(Tile(32, 128, 1, 4, 3, wide=True), WAVE)],
    [Choice(Tile(64, 64, 1, 4, 3), 300)],
    [Choice(Tile(128, 64, 1, 4, 3), 264)],
    [Choice(Tile(128, 64, 1, 4, 3), 264)],
    [Choice(Tile(128, 128, 1, 8, 3), 1)],
)


LONG = 8192
"""K from which on a sum counts as long."""


@lru_cache(maxsize=4096)
def pick_int4(m: int, n: int, k: int) -> Tile:
    """The tile of W4 for x [m, k] and W [n, k]."""
    return pick(INT4, m, n, k)


@lru_cache(maxsize=4096)
def pick_rows(m: int, n: int, k: int) -> Tile:
    """The tile of 8-bit weights and full-precision x [m, k], W [n, k]."""
    return pick(ROWS, m, n, k)


@lru_cache(maxsize=4096)
def pick_fp8(m: int, n: int, k: int) -> Tile:
    """The tile of FP8 weights and FP8 rows x [m, k], W [n, k]."""
    return pick(FP8, m, n, k)


def pick(table: Table, m: int, n: int, k: int) -> Tile:
    """The table's tile for x [m, k] and W [n, k]; every split has at least two steps along K."""
    for choice in table[bisect_left(EDGES, m)]:
        tiles_m, tiles_n, _ = choice.tile.grid(m, n)
        tiles = tiles_m * tiles_n
        if tiles <= choice.most_tiles:
            break
    wanted = choice.programs / tiles * (choice.long if k > LONG else 1)
    splits = 1 << max(0, round(log2(wanted)))
    while splits * 2 * choice.tile.bk > k and splits > 1:
        splits //= 2
    if tiles > -(-n // LOCK_ROWS):
        splits = 1  # very few rows of W: there are not enough locks
    return replace(choice.tile, splits=splits)
