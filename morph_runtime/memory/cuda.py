"""The page arena in GPU memory: CUDA virtual memory management, by the driver's own interface.

Physical extents are created once. Moving one between ranges is an unmap and a map of its handle; no
call waits for the GPU to be idle, so the caller keeps fences (memory.fence). Costs follow the number of
extents, not the bytes: mapping access is set once per run of pieces. One thread makes these calls, which release
Python's lock, so steps are launched meanwhile; access, above all, cannot be set while bytes come from the host.

A tensor over a range is a view of one uint8 tensor that is made when the range is reserved, through
the CUDA array interface, while its first piece is mapped for a moment: PyTorch asks the driver what
lies behind the first address.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from morph_runtime.errors import ConfigError
from morph_runtime.memory.arena import UNMAPPED, PageArena, VirtualRange, runs
from morph_runtime.memory.moves import Move, ThreadWorker


class CudaPageArena(PageArena):
    """Physical memory is taken in full when the arena is made, so a budget that fits stays fitting."""

    def __init__(self, total_extents: int, extent_bytes: int, device: int = 0) -> None:
        """Take `total_extents * extent_bytes` bytes of a GPU whose primary context is current.

        Raises:
            ConfigError: the GPU has not that much memory free, cannot manage virtual memory, or has pages of which
                `extent_bytes` is no multiple.
        """
        from cuda.bindings import driver

        self._driver: Any = driver
        self._device = device
        prop = driver.CUmemAllocationProp()
        prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        prop.location.id = device
        self._access = driver.CUmemAccessDesc()
        self._access.location = prop.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = int(self._call(driver.cuMemGetAllocationGranularity(prop, minimum)))
        if extent_bytes % granularity:
            raise ConfigError(f"memory.extent_kib must be a multiple of {granularity // 1024} on this GPU.")
        self._granularity = granularity
        free, _ = torch.cuda.mem_get_info(device)
        if total_extents * extent_bytes > free:
            raise ConfigError(
                f"memory.budget_gib needs {total_extents * extent_bytes / 2**30:.3f} GiB for the arena, but the GPU "
                f"has {free / 2**30:.3f} GiB free."
            )
        self._prop = prop
        self._handles: list[Any] = []
        self._spans: list[tuple[int, int]] = []
        self._bases: dict[str, torch.Tensor] = {}
        context = self._call(driver.cuCtxGetCurrent())
        super().__init__(total_extents, extent_bytes, ThreadWorker("page-moves", lambda: self.on_move()))
        # The driver keeps a current context by thread; where that fails, so do all moves behind.
        self._order(Move(partial(self._make_current, context), undo=lambda: None, gives=False), 1)
        self._create(total_extents)

    def extend(self, count: int) -> None:
        """Take memory for `count` more extents.

        Raises:
            ConfigError: the GPU has not that much free; the arena has been closed.
        """
        self._create(count)
        self._add_extents(count)

    def _create(self, count: int) -> None:
        try:
            for _ in range(count):
                self._handles.append(self._call(self._driver.cuMemCreate(self.extent_bytes, self._prop, 0)))
        except OSError as error:
            self.close()
            raise ConfigError(f"memory.budget_gib could not be had from the GPU: {error}.") from error

    def reserve(self, name: str, nbytes: int) -> VirtualRange:
        """See `PageArena.reserve`. One extent must be free."""
        span = super().reserve(name, nbytes)
        self.map(span, 0, 1).finish()
        self._bases[name] = torch.as_tensor(_Bytes(span.address, span.extents * self.extent_bytes), device="cuda")
        self.unmap(span, 0, 1)
        return span

    def tensor(self, span: VirtualRange, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `PageArena.tensor`; touching unmapped pieces is an illegal access that ends the CUDA context."""
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        if offset < 0 or offset + nbytes > span.extents * self.extent_bytes:
            raise ValueError(f"{nbytes} bytes at {offset} lie outside the range '{span.name}'")
        return self._bases[span.name][offset : offset + nbytes].view(dtype).view(*shape)

    @contextmanager
    def backed(self) -> Iterator[None]:
        """Every reserved address has memory for a while: one free extent stands behind all that have none.

        For capturing graphs: launchers ask the driver about each pointer that they are given. What is written there
        meanwhile is lost. Nothing may be ordered meanwhile.
        """
        self.settle()
        (extent,) = self._free.take(1)
        size, aliases = self.extent_bytes, list[tuple[int, int]]()
        try:
            for span in self._ranges.values():
                for first, count in _runs(span, mapped=False):
                    address = span.address + first * size
                    for piece in range(count):
                        self._call(self._driver.cuMemMap(address + piece * size, size, 0, self._handles[extent], 0))
                        aliases.append((address + piece * size, size))
                    self._call(self._driver.cuMemSetAccess(address, count * size, [self._access], 1))
            yield
        finally:
            torch.cuda.synchronize(self._device)
            for address, nbytes in aliases:
                self._unmap(address, nbytes)
            self._free.give([extent])

    def close(self) -> None:
        """See `PageArena.close`; waits for the worker and the GPU."""
        assert self._line is not None
        self._line.close()
        torch.cuda.synchronize(self._device)
        self._bases.clear()
        for span in self._ranges.values():
            for first, count in _runs(span, mapped=True):
                self._unmap(span.address + first * self.extent_bytes, count * self.extent_bytes)
            span.physical = [UNMAPPED] * span.extents
        for address, nbytes in self._spans:
            self._call(self._driver.cuMemAddressFree(address, nbytes))
        self._spans.clear()
        for handle in self._handles:
            self._call(self._driver.cuMemRelease(handle))
        self._handles.clear()

    def _make_current(self, context: Any) -> None:
        """In the worker: the driver keeps a current context by thread."""
        self._call(self._driver.cuCtxSetCurrent(context))

    def _reserve(self, nbytes: int) -> int:
        # One granule more, so that ranges are never neighbours: running over an end faults.
        size = nbytes + self._granularity
        address = int(self._call(self._driver.cuMemAddressReserve(size, self.extent_bytes, 0, 0)))
        self._spans.append((address, size))
        return address

    def _map(self, address: int, extent: int, count: int) -> None:
        size, done = self.extent_bytes, 0
        try:
            for done in range(count):
                self._call(self._driver.cuMemMap(address + done * size, size, 0, self._handles[extent + done], 0))
            done = count
            self._call(self._driver.cuMemSetAccess(address, count * size, [self._access], 1))
        except OSError as reason:
            if done:
                self._take_back(address, done * size, reason)
            raise

    def _unmap(self, address: int, nbytes: int) -> None:
        self._call(self._driver.cuMemUnmap(address, nbytes))

    def _call(self, result: tuple[Any, ...]) -> Any:
        """The value of a driver call; raises OSError with the driver's own name for what is wrong."""
        status = result[0]
        if int(status) != 0:
            _, text = self._driver.cuGetErrorName(status)
            raise OSError(int(status), f"the CUDA driver says {text.decode() if text else status}")
        return result[1] if len(result) > 1 else None


class _Bytes:
    """What PyTorch needs to see of a piece of GPU memory."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


def _runs(span: VirtualRange, mapped: bool) -> list[tuple[int, int]]:
    """Consecutive pieces with memory, or without, as (first, count)."""
    return runs([piece for piece, extent in enumerate(span.physical) if (extent != UNMAPPED) == mapped])
