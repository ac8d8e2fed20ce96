"""What is free and what is resident, told apart by range, by kind and by memory cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from memory.alone import run_alone
from morph_runtime.memory.smaps import available_bytes

EXTENT = 16 * 1024
MIB = 2**20


def machine(root: Path, available: int, cgroup: str, groups: dict[str, dict[str, str]]) -> Path:
    """A root folder whose /proc and /sys say this."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999 kB\nMemAvailable: {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for folder, files in groups.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(text + "\n")
    return root


def v2(limit: str, used: int, cache: int = 0) -> dict[str, str]:
    stat = f"anon {used - cache}\nactive_file {cache // 2}\ninactive_file {cache - cache // 2}"
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": stat}


def v1(limit: int, used: int, cache: int) -> dict[str, str]:
    stat = f"active_file 0\ntotal_active_file 0\ntotal_inactive_file {cache}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}


@pytest.mark.parametrize(
    "cgroup, groups, expected",
    [
        ("0::/\n", {}, 800 * MIB),
        ("0::/\n", {".": v2("max", 5 * MIB)}, 800 * MIB),
        ("0::/\n", {".": v2(str(500 * MIB), 100 * MIB)}, 400 * MIB),
        ("0::/\n", {".": v2(str(500 * MIB), 450 * MIB, cache=300 * MIB)}, 350 * MIB),
        ("0::/a/b\n", {"a/b": v2("max", MIB), "a": v2(str(64 * MIB), 4 * MIB)}, 60 * MIB),
        ("0::/a/b\n", {"a/b": v2(str(32 * MIB), 2 * MIB), "a": v2(str(64 * MIB), 4 * MIB)}, 30 * MIB),
        ("0::/../../x\n", {".": v2(str(9 * MIB), 4 * MIB)}, 5 * MIB),
        ("0::/gone\n", {".": v2(str(9 * MIB), 10 * MIB)}, 0),
        ("5:cpu,memory:/a\n0::/\n", {"memory/a": v1(90 * MIB, 50 * MIB, 20 * MIB)}, 60 * MIB),
        ("5:memory:/docker/id\n", {"memory": v1(2**63 - 4096, MIB, 0)}, 800 * MIB),
        ("5:memory:/docker/id\n", {"memory": v1(70 * MIB, 10 * MIB, 0)}, 60 * MIB),
    ],
)
def test_available_memory_is_the_least_that_machine_and_cgroups_leave(
    tmp_path: Path, cgroup: str, groups: dict[str, dict[str, str]], expected: int
) -> None:
    assert available_bytes(machine(tmp_path, 800 * MIB, cgroup, groups)) == expected


KINDS = """
import torch
from morph_runtime.memory.cpu import CpuPageArena
from morph_runtime.memory.smaps import process_memory, process_rss_bytes, rss_by_range
mib, extent = 1 << 20, 16 << 10
before = process_memory()
arena = CpuPageArena(64 * mib // extent, extent)
spans = {name: arena.reserve(name, size * mib) for name, size in {"weights": 40, "kv": 24, "idle": 8}.items()}
arena.map(spans["weights"], 0, 40 * mib // extent)
arena.map(spans["kv"], 16, 3)
by_range = rss_by_range({name: (span.address, span.extents * extent) for name, span in spans.items()})
after = process_memory()
whole, in_all = process_rss_bytes(), after.total
said = arena.resident_bytes()
arena.close()
own = after.anonymous + after.file - before.anonymous - before.file
left = process_memory().shared - before.shared
print(json.dumps([by_range, said, after.shared - before.shared, own, whole - in_all, left]))
"""


def test_resident_memory_is_told_apart_by_range_and_by_kind() -> None:
    by_range, said, shared, own, difference, left = run_alone(KINDS)
    assert by_range == said == {"weights": 40 * MIB, "kv": 3 * EXTENT, "idle": 0}
    assert shared == 40 * MIB + 3 * EXTENT
    tolerance = 4 * MIB  # the interpreter's own memory, and statm is counted per core
    assert abs(own) < tolerance
    assert abs(difference) < tolerance
    assert left == 0
