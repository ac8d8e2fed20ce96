"""What the engine's process needs of its environment before PyTorch does its first work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from morph_runtime.config import EngineConfig

CACHED_PRIMITIVES = 32
"""Compiled products that oneDNN and PyTorch keep, by shape (theirs: 1024 each). A step's number of tokens changes all
the time, so with their defaults the caches of a busy engine grow to a gigabyte; 32 cost no speed (bench/memory)."""
PRIMITIVE_CACHE_BYTES = 40 * 2**20
"""What those caches come to, measured; counted as workspace."""


def cpu_threads(config: EngineConfig) -> int:
    """Threads of the engine: as configured, else all cores that this process may use but one, at least one."""
    return config.kernels.threads or max(1, usable_cores() - 1)


def usable_cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores by CPU affinity, or by the cgroup's CPU quota if that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return min(cores, max(1, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else cores


def engine_variables(config: EngineConfig) -> Mapping[str, str]:
    """Environment variables that must stand before the libraries that read them are used."""
    threads, primitives = str(cpu_threads(config)), str(CACHED_PRIMITIVES)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "LRU_CACHE_CAPACITY": primitives,
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": primitives,
    }
