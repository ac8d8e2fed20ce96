"""Which tile sizes the products use: a table by the number of rows, found by measurement (bench/gpu_kernels)."""

from __future__ import annotations

from dataclasses import dataclass


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
    mode: str = ""
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


EDGES = (1, 8, 16, 32, 64, 128, 256)
"""The largest numbers of rows of x that one entry of the tables serves; more rows take the last one."""

PROGRAMS = 132 * 4
"""Programs that fill a GPU when memory is the limit: a few per multiprocessor."""


def pick_int4(m: int, n: int, k: int) -> Tile:
    """The tile of W4 for x [m, k] and W [n, k]."""
    return pick_rows(m, n, k)


def pick_rows(m: int, n: int, k: int) -> Tile:
    """The tile of FP8 weights and full-precision x [m, k], W [n, k]."""
    if m <= 8:
        bm, bn, warps, stages = 8, 64, 4, 3
    elif m <= 16:
        bm, bn, warps, stages = 16, 64, 2, 3
    elif m <= 32:
        bm, bn, warps, stages = 32, 64, 2, 3
    elif m <= 64:
        bm, bn, warps, stages = 64, 64, 4, 3
    else:
        bm, bn, warps, stages = 128, 128, 8, 3
    tiles = -(-m // bm) * -(-n // bn)
    splits = max(1, min(round(PROGRAMS / tiles), k // 512)) if m <= 64 else 1
    return Tile(bm, bn, splits, warps, stages)


def pick_fp8(m: int, n: int, k: int) -> Tile:
    """The tile of FP8 weights and FP8 rows x [m, k], W [n, k]."""
    return pick_rows(m, n, k)
