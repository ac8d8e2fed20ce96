"""Whether a series of samples grows: what processes hold at moments of calm, and a slope that outliers do not move."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """What a process holds. Memory in MB (10^6 bytes): resident, of it what belongs to no file, and what its allocator
    counts as in use (None: not asked)."""

    at_s: float
    resident: float
    anonymous: float
    threads: int
    descriptors: int
    in_use: float | None = None


def sample(pid: int, at_s: float, in_use: float | None = None) -> Sample:
    """Of one process, now."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.split()
    kib = {name: int(fields[name][0]) for name in ("VmRSS", "RssAnon")}
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    resident, anonymous = kib["VmRSS"] * 1.024e-3, kib["RssAnon"] * 1.024e-3
    return Sample(at_s, resident, anonymous, int(fields["Threads"][0]), descriptors, in_use)


def slope_per_hour(times_s: Sequence[float], values: Sequence[float]) -> float:
    """The median of the slopes between all pairs of samples (Theil 1950, Sen 1968), per hour.

    Up to 29 % of the samples may be anything without moving it far.
    """
    pairs = combinations(zip(times_s, values, strict=True), 2)
    slopes = [(after - before) / (late - early) for (early, before), (late, after) in pairs if late > early]
    return 3600.0 * statistics.median(slopes)
