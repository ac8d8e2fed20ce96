"""What the kernel says of memory: resident bytes of a process and of address ranges, and what is still free."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

KIB = 1024


@dataclass(frozen=True)
class ProcessMemory:
    """Resident bytes of a process by kind; the arena's pages are `shared`, all else is its baseline."""

    anonymous: int
    file: int
    shared: int

    @property
    def total(self) -> int:
        """RSS in bytes."""
        return self.anonymous + self.file + self.shared


def process_rss_bytes(pid: int | str = "self") -> int:
    """Resident bytes of a process; cheap enough for every statistics snapshot."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


def process_memory(pid: int | str = "self") -> ProcessMemory:
    """Resident bytes of a process by kind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    anonymous, file, shared = (int(sizes[key].split()[0]) * KIB for key in ("RssAnon", "RssFile", "RssShmem"))
    return ProcessMemory(anonymous, file, shared)


def range_rss_bytes(address: int, nbytes: int, pid: int | str = "self") -> int:
    """Resident bytes of the mappings that begin within [address, address + nbytes)."""
    return rss_by_range({"": (address, nbytes)}, pid)[""]


def rss_by_range(ranges: Mapping[str, tuple[int, int]], pid: int | str = "self") -> dict[str, int]:
    """Resident bytes of each range (address, bytes) by name, in one reading of smaps.

    A mapping counts for the range in which it begins; ranges of an arena never share one. The kernel walks
    the page tables for this (milliseconds per GiB): for reports, not for every step.
    """
    result = dict.fromkeys(ranges, 0)
    ordered = sorted((address, address + nbytes, name) for name, (address, nbytes) in ranges.items())
    starts = [address for address, _, _ in ordered]
    for address, rss in _mappings(pid):
        place = bisect.bisect_right(starts, address) - 1
        if place >= 0 and address < ordered[place][1]:
            result[ordered[place][2]] += rss
    return result


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can still be taken: the machine's available memory, or what a memory cgroup leaves if less.

    Page cache counts as available, as it does in MemAvailable: reading a checkpoint must not make it look taken.

    Args:
        root: folder that holds `proc` and `sys` (tests).
    """
    available = 0
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * KIB
    return min([available, *_left_by_cgroups(root)])


def _mappings(pid: int | str) -> Iterator[tuple[int, int]]:
    """(first address, resident bytes) of every mapping."""
    address = 0
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            head, _, rest = line.partition(" ")
            if head == "Rss:":
                yield address, int(rest.split()[0]) * KIB
            elif not head.endswith(":"):
                address = int(head.partition("-")[0], 16)


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """Bytes that each memory cgroup around this process still allows, innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, prefix = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, prefix = root / "sys/fs/cgroup/memory", "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = [] if ".." in path else [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if most.isdigit():
                cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield max(0, int(most) - used + cache)
