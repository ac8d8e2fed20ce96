"""The contract of the page arena.

Physical memory is created once, as extents of equal size. Address ranges are reserved apart from
it. `map` puts extents behind addresses, `unmap` takes them away; addresses never change, so tensors
and captured graphs over a range stay valid.

The books change when a move is ordered. An arena with a worker leaves the system's part to that thread, which does
all moves in their order (`memory.moves`): memory may be touched once its `Move` is done. Without one, everything is
done when the call returns.

The calls are those of CUDA's virtual memory management: `reserve` is cuMemAddressReserve, the
constructor runs cuMemCreate once per extent, `_map` is one cuMemMap per extent and one cuMemSetAccess
over the whole run, `_unmap` is one cuMemUnmap over whole extents (it releases no handle), `close` adds
cuMemRelease and cuMemAddressFree. An extent is then a multiple of the device's allocation granularity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from morph_runtime.errors import IntegrityError, MorphError
from morph_runtime.memory.moves import Move, MoveLine, MoveWorker

UNMAPPED = -1


class ArenaExhausted(MorphError):
    """Fewer extents are free than a `map` needs. Nothing has changed."""


class VirtualRange:
    """Reserved addresses. `physical[i]` is the extent behind the i-th piece, perhaps on its way there, or UNMAPPED."""

    def __init__(self, name: str, address: int, extents: int) -> None:
        self.name = name
        self.address = address
        self.extents = extents
        self.physical = [UNMAPPED] * extents

    @property
    def mapped(self) -> int:
        """Pieces that have memory."""
        return sum(1 for p in self.physical if p != UNMAPPED)


class PageArena(ABC):
    """Extents and ranges. Calls come from one thread, but `_map` and `_unmap` from the worker; tensors may be used from
    any."""

    def __init__(self, total_extents: int, extent_bytes: int, worker: MoveWorker | None = None) -> None:
        """`worker`: maps and unmaps; None: the calling thread does."""
        self.total_extents = total_extents
        self.extent_bytes = extent_bytes
        self.on_move: Callable[[], None] = lambda: None
        """For a worker to call whenever a move is done."""
        self._free = ExtentList(total_extents)
        self._ranges: dict[str, VirtualRange] = {}
        self._line = None if worker is None else MoveLine(worker)

    @property
    def free_extents(self) -> int:
        """Extents that are behind no address, or will not be when a `map` that is ordered now is done."""
        return len(self._free)

    @property
    def is_settled(self) -> bool:
        """No extent is on its way."""
        return self._line is None or self._line.is_settled

    def check_moves(self) -> None:
        """See what has come of the moves under way; call now and then.

        Raises:
            OSError: memory could not be taken away; it is where it was, and all that was ordered behind is undone.
        """
        if self._line is not None:
            self._line.check()

    def settle(self) -> None:
        """Wait until no extent is on its way; raises as `check_moves`."""
        if self._line is not None:
            self._line.wait()
            self._line.check()

    @property
    def ranges(self) -> Mapping[str, VirtualRange]:
        """All reserved ranges, by name."""
        return self._ranges

    def reserve(self, name: str, nbytes: int) -> VirtualRange:
        """Reserve addresses for `nbytes`, rounded up to extents; takes no memory.

        Raises:
            ValueError: the name is taken, or `nbytes` is not positive.
            OSError: the address space is exhausted.
        """
        if name in self._ranges or nbytes <= 0:
            raise ValueError(f"cannot reserve {nbytes} bytes as '{name}'")
        extents = -(-nbytes // self.extent_bytes)
        span = VirtualRange(name, self._reserve(extents * self.extent_bytes), extents)
        self._ranges[name] = span
        return span

    def map(self, span: VirtualRange, first: int, count: int) -> Move:
        """Put `count` free extents behind the pieces from `first` on, which may be touched once the move is done.
        Their content is undefined.

        Raises:
            ArenaExhausted: fewer are free; nothing has changed.
            IntegrityError: a piece has memory already, or lies outside the range; nothing has changed.
            OSError: the system refused (too many mappings, say); nothing has changed. With a worker, the move says so.
        """
        if not _inside(span, first, count) or any(p != UNMAPPED for p in span.physical[first : first + count]):
            raise IntegrityError(f"{span.name}: pieces {first}..{first + count - 1} cannot be mapped.")
        if count > len(self._free):
            raise ArenaExhausted(f"{span.name}: {count} extents are needed, {len(self._free)} are free.")
        taken = self._free.take(count)
        span.physical[first : first + count] = taken
        address = span.address + first * self.extent_bytes
        work, undo = partial(self._put, address, taken), partial(self._enter_unmapped, span, first, taken)
        return self._order(Move(work, undo, gives=True), count)

    def unmap(self, span: VirtualRange, first: int, count: int) -> Move:
        """Take the memory of `count` pieces away; it is free again, its content is lost. Nobody may touch it any more.

        Raises:
            IntegrityError: a piece has no memory, or lies outside the range; nothing has changed.
            OSError: the system refused; the books are unchanged. With a worker, `check_moves` says so.
        """
        pieces = span.physical[first : first + count]
        if not _inside(span, first, count) or UNMAPPED in pieces:
            raise IntegrityError(f"{span.name}: pieces {first}..{first + count - 1} are not all mapped.")
        self._enter_unmapped(span, first, pieces)
        address = span.address + first * self.extent_bytes
        work = partial(self._unmap, address, count * self.extent_bytes)
        return self._order(Move(work, partial(self._enter_mapped, span, first, pieces), gives=False), count)

    def _order(self, move: Move, count: int) -> Move:
        """Have it done by the worker, or do it."""
        if count and self._line is not None:
            self._line.order(move)
        elif count:
            try:
                move.work()
            except OSError:
                move.undo()
                raise
        return move

    def _put(self, address: int, extents: Sequence[int]) -> None:
        """Put these extents behind addresses, or raise OSError and change nothing."""
        place = address
        try:
            for start, length in runs(extents):
                self._map(place, start, length)
                place += length * self.extent_bytes
        except OSError as reason:
            if place > address:
                self._take_back(address, place - address, reason)
            raise

    def _take_back(self, address: int, nbytes: int, reason: OSError) -> None:
        """Undo the part of a mapping that was done before the system refused the rest.

        Raises:
            IntegrityError: that was refused as well.
        """
        try:
            self._unmap(address, nbytes)
        except OSError as second:
            raise IntegrityError(f"Half a mapping can be neither ended ({reason}) nor undone ({second}).") from second

    def _enter_mapped(self, span: VirtualRange, first: int, extents: list[int]) -> None:
        self._free.remove(extents)
        span.physical[first : first + len(extents)] = extents

    def _enter_unmapped(self, span: VirtualRange, first: int, extents: list[int]) -> None:
        span.physical[first : first + len(extents)] = [UNMAPPED] * len(extents)
        self._free.give(extents)

    def _add_extents(self, count: int) -> None:
        """Enter `count` new extents, whose memory is there, as free."""
        self._free.give(list(range(self.total_extents, self.total_extents + count)))
        self.total_extents += count

    def resident_bytes(self) -> dict[str, int]:
        """Mapped bytes by range name, with what is on its way there."""
        return {name: span.mapped * self.extent_bytes for name, span in self._ranges.items()}

    def check_integrity(self) -> None:
        """Every extent is free or behind exactly one address.

        Raises:
            IntegrityError: it is not.
        """
        mapped = [p for span in self._ranges.values() for p in span.physical if p != UNMAPPED]
        if len(set(mapped)) != len(mapped):
            raise IntegrityError("An extent is mapped twice.")
        if sorted([*mapped, *self._free]) != list(range(self.total_extents)):
            raise IntegrityError(
                f"{len(mapped)} mapped and {len(self._free)} free extents do not make up {self.total_extents}."
            )

    @abstractmethod
    def tensor(self, span: VirtualRange, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view over the addresses from byte `offset` on; valid for the arena's life.

        It may reach over pieces without memory. Touching those is a fault of the caller that ends
        the process (a segmentation fault on CPU), by intent: it can never read another's data.

        Raises:
            ValueError: it does not lie within the range.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back to the system. No tensor may be used afterwards."""

    @abstractmethod
    def _reserve(self, nbytes: int) -> int:
        """Addresses without memory; returns the first."""

    @abstractmethod
    def _map(self, address: int, extent: int, count: int) -> None:
        """Put `count` consecutive extents from `extent` on behind `address`, or raise OSError and change nothing.
        Touches no books."""

    @abstractmethod
    def _unmap(self, address: int, nbytes: int) -> None:
        """Leave addresses, whole extents of one range, reserved but without memory. Waits for no reader, touches no
        books."""


class ExtentList:
    """Free extents; hands out the lowest, so that runs stay long and mappings few."""

    def __init__(self, total: int) -> None:
        self._ids = list(range(total))

    def __len__(self) -> int:
        """How many are free."""
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        """The free ids, ascending."""
        return iter(self._ids)

    def take(self, count: int) -> list[int]:
        """The `count` lowest ids."""
        taken, self._ids = self._ids[:count], self._ids[count:]
        return taken

    def remove(self, ids: Iterable[int]) -> None:
        """Take these, which are free."""
        gone = set(ids)
        self._ids = [i for i in self._ids if i not in gone]

    def give(self, ids: list[int]) -> None:
        """Put ids back."""
        self._ids = sorted(self._ids + ids)  # timsort merges the two sorted runs in linear time


def _inside(span: VirtualRange, first: int, count: int) -> bool:
    return 0 <= first <= first + count <= span.extents


def runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive ids as (first, length)."""
    result: list[tuple[int, int]] = []
    for i in ids:
        if result and sum(result[-1]) == i:
            result[-1] = (result[-1][0], result[-1][1] + 1)
        else:
            result.append((i, 1))
    return result
