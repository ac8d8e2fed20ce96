"""What it costs to move memory from weights to KV cache and back, by extent size. See README.md.

python bench/memory/move.py --mib 64 320 --json bench/memory/results/cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from morph_runtime.kv import KVCache, KVLayout
from morph_runtime.memory.cpu import CpuPageArena
from morph_runtime.memory.smaps import process_rss_bytes

KIB, MIB = 1024, 2**20
LAYERS = 16
MIGRATED_BLOCKS = 64


@dataclass(frozen=True)
class Row:
    """Medians over the repetitions, in milliseconds of the calling thread."""

    mib: int
    extent_kib: int
    prefault: bool
    unmap_ms: float
    """Take the memory from the weights' range."""
    grow_ms: float
    """Map it behind K and V of every layer, zeroed: ready for use."""
    shrink_ms: float
    """Take it from all KV ranges."""
    map_ms: float
    """Put it behind the weights' range again."""
    fill_ms: float
    """Write every byte of it (page faults included, where not prefaulted)."""
    migrate_ms: float
    """Copy 64 blocks in every layer, as a shrink does with what is live."""
    mappings: int
    """Mappings of the arena while KV holds the memory."""
    rss_change_kib: int
    """Largest change of the process's resident size over the moves."""


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def measure(mib: int, extent_bytes: int, prefault: bool, repeats: int) -> Row:
    layout = KVLayout(LAYERS, kv_heads=4, head_dim=64, block_tokens=16, dtype=torch.bfloat16)
    quantum = layout.quantum(extent_bytes)
    quanta = mib * MIB // (quantum.extents * extent_bytes)
    if not quanta:
        raise SystemExit(f"{mib} MiB is less than one quantum of {quantum.extents} extents of {extent_bytes} bytes.")
    extents = quanta * quantum.extents
    arena = CpuPageArena(extents, extent_bytes, prefault=prefault)
    weights = arena.reserve("weights", extents * extent_bytes)
    view = arena.tensor(weights, 0, (extents * extent_bytes,), torch.uint8)
    cache = KVCache(arena, layout, quanta * quantum.blocks)
    arena.map(weights, 0, extents)
    view.fill_(1)
    columns: dict[str, list[float]] = {name: [] for name in ("unmap", "grow", "shrink", "map", "fill", "migrate")}
    mappings, sizes = 0, []
    pairs = [(cache.max_blocks - 1 - n, n) for n in range(min(MIGRATED_BLOCKS, cache.max_blocks // 2))]
    for _ in range(1 + repeats):  # the first round warms up and does not count
        columns["unmap"].append(timed(lambda: arena.unmap(weights, 0, extents)))
        columns["grow"].append(timed(lambda: cache.grow(quanta)))
        columns["migrate"].append(timed(lambda: cache.copy_blocks(pairs)))
        mappings = sum("morph-arena" in line for line in Path("/proc/self/maps").read_text().splitlines())
        sizes.append(process_rss_bytes())
        columns["shrink"].append(timed(lambda: cache.shrink(quanta)))
        columns["map"].append(timed(lambda: arena.map(weights, 0, extents)))
        columns["fill"].append(timed(lambda: view.fill_(1)))
        sizes.append(process_rss_bytes())
    arena.check_integrity()
    arena.close()
    medians = {f"{name}_ms": round(statistics.median(values[1:]), 2) for name, values in columns.items()}
    change = max(abs(size - sizes[1]) for size in sizes[1:]) // KIB
    return Row(
        mib=extents * extent_bytes // MIB, extent_kib=extent_bytes // KIB, prefault=prefault,
        mappings=mappings, rss_change_kib=change, **medians,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 320], help="MiB to move")
    parser.add_argument("--extent-kib", type=int, nargs="+", default=[16, 64, 256, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (they share the zeroing)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [
        measure(mib, kib * KIB, prefault, given.repeats)
        for mib in given.mib
        for prefault in (True, False)
        for kib in given.extent_kib
    ]
    names = list(asdict(rows[0]))
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(value) for value in asdict(row).values()) + " |")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {
            "cores": os.cpu_count(), "kernel": platform.release().split("-")[0], "python": platform.python_version(),
            "torch": torch.__version__, "threads": given.threads, "repeats": given.repeats, "layers": LAYERS,
            "load_average": os.getloadavg()[0],
        }  # fmt: skip
        result = {"machine": machine, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
