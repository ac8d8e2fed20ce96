"""The page arena in host memory: extents of one memfd, mapped with MAP_FIXED into reserved ranges.

A memfd's pages belong to the file, not to an address: unmapping them in one place and mapping them
in another moves bytes without copying, and the process's resident size stays what it is. (An extent
behind two addresses would count twice, and MADV_DONTNEED frees nothing of a memfd; neither is used.)

Facts of the platform:

* A memfd is not bounded by the size of /dev/shm, but its pages count against the memory cgroup, in full
  from the start, mapped or not. RSS counts what is mapped: free extents (staging) are missing in it.
* A child that forks inherits the ranges as they were and shares the pages: it would write into live KV
  blocks, and sees no later move. The engine forks none; the descriptor is closed on exec.
* `map` and `unmap` are for one thread. Other threads may read and write tensors meanwhile, unless their
  extents are being unmapped: there is no event to wait for as on a GPU, so the caller joins them first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch

from morph_runtime.errors import ConfigError
from morph_runtime.memory.arena import PageArena, VirtualRange
from morph_runtime.memory.smaps import available_bytes

PROT_NONE = 0
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
MAP_POPULATE = 0x8000
MAP_FAILED = ctypes.c_void_p(-1).value


class CpuPageArena(PageArena):
    """Physical memory is taken in full when the arena is made, so a budget that fits stays fitting."""

    def __init__(self, total_extents: int, extent_bytes: int, prefault: bool = True) -> None:
        """Take `total_extents * extent_bytes` bytes.

        Args:
            total_extents: physical extents, all free at first.
            extent_bytes: bytes of one, a multiple of the page size.
            prefault: `map` fills the page tables at once, instead of one page fault per 4 KiB at first touch
                (see bench/memory), so that a mapped range is resident in full from then on.

        Raises:
            ConfigError: the machine, or the memory cgroup around this process, does not have that much memory.
            ValueError: `extent_bytes` is not a multiple of the page size, or there are no extents.
        """
        if extent_bytes % mmap.PAGESIZE or total_extents <= 0:
            raise ValueError(f"{total_extents} extents of {extent_bytes} bytes are not whole pages")
        total = total_extents * extent_bytes
        free = available_bytes()
        if total > free:
            raise ConfigError(
                f"memory.budget_gib needs {total / 2**30:.3f} GiB, but this machine has {free / 2**30:.3f} GiB free."
            )
        super().__init__(total_extents, extent_bytes)
        self._map_flags = mmap.MAP_SHARED | MAP_FIXED | (MAP_POPULATE if prefault else 0)
        self._libc = _libc()
        self._spans: list[tuple[int, int]] = []
        self._fd = os.memfd_create("morph-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, total)
            os.posix_fallocate(self._fd, 0, total)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"memory.budget_gib needs {total / 2**30:.3f} GiB, which the system refused: {error.strerror}."
            ) from error

    def tensor(self, span: VirtualRange, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `PageArena.tensor`."""
        count = 1
        for size in shape:
            count *= size
        nbytes = count * dtype.itemsize
        if offset < 0 or offset + nbytes > span.extents * self.extent_bytes:
            raise ValueError(f"{nbytes} bytes at {offset} lie outside the range '{span.name}'")
        buffer = (ctypes.c_char * nbytes).from_address(span.address + offset)
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(*shape)

    def close(self) -> None:
        """See `PageArena.close`."""
        for address, nbytes in self._spans:
            self._libc.munmap(address, nbytes)
        self._spans.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _reserve(self, nbytes: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        # One extent more, so that ranges of different owners are never neighbours: running over an end faults.
        address = self._mmap(None, nbytes + self.extent_bytes, PROT_NONE, flags, -1, 0)
        self._spans.append((address, nbytes + self.extent_bytes))
        return address

    def _map(self, address: int, extent: int, count: int) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        offset, nbytes = extent * self.extent_bytes, count * self.extent_bytes
        try:
            self._mmap(address, nbytes, protection, self._map_flags, self._fd, offset)
        except OSError:
            self._unmap(address, nbytes)  # a refused MAP_FIXED may leave a hole that another mmap could get
            raise

    def _unmap(self, address: int, nbytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE
        self._mmap(address, nbytes, PROT_NONE, flags, -1, 0)

    def _mmap(self, address: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
        result: int = self._libc.mmap(address, nbytes, protection, flags, fd, offset)
        if result == MAP_FAILED:
            error = ctypes.get_errno()
            raise OSError(error, f"mmap of {nbytes} bytes: {os.strerror(error)}")
        return result


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, number = ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, size]
    return libc
