"""One rung's address range: a slot for each layer, side by side, with memory behind those in use."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from morph_runtime.errors import IntegrityError
from morph_runtime.memory.arena import UNMAPPED, PageArena, runs
from morph_runtime.memory.ledger import slot_pieces, slot_stride
from morph_runtime.memory.moves import Move


class SlotRange:
    """Slots of equal size. A piece (an extent's worth of addresses) has memory while any slot on it is in use."""

    def __init__(self, arena: PageArena, name: str, slot_bytes: int, count: int) -> None:
        """Reserve addresses for `count` slots; takes no memory."""
        self._arena = arena
        self._slot_bytes = slot_bytes
        self._stride = slot_stride(slot_bytes)
        self._range = arena.reserve(name, count * self._stride)
        self._users = [0] * self._range.extents
        self._mapped: set[int] = set()

    def is_mapped(self, place: int) -> bool:
        """Whether a slot has memory."""
        return place in self._mapped

    def missing(self, place: int) -> int:
        """Extents that `map` would take."""
        return sum(1 for piece in self._pieces(place) if not self._users[piece])

    def map(self, place: int) -> Move:
        """Put memory behind a slot, which may be touched when this move and all before it are done: a neighbour's may
        bring a piece of it. Its content is undefined, except where another slot's pieces reach into it.

        Raises:
            ArenaExhausted, OSError: too few free extents, or the system refused; nothing has changed. If the move fails
                later, `unmap` the slot, and those that were mapped behind it.
            IntegrityError: it has memory already; nothing has changed.
        """
        if place in self._mapped:
            raise IntegrityError(f"{self._range.name}: slot {place} has memory already.")
        pieces = self._pieces(place)
        fresh = [piece for piece in pieces if not self._users[piece]]
        # Pieces shared with neighbours lie at the ends, so what is missing is one run, or nothing.
        move = self._arena.map(self._range, fresh[0] if fresh else 0, len(fresh))
        for piece in pieces:
            self._users[piece] += 1
        self._mapped.add(place)
        return move

    def unmap(self, place: int) -> None:
        """Give the memory of a slot back, but for what its neighbours use. Its move must be over; if that has failed,
        there may be none.

        Raises:
            IntegrityError: it has no memory; nothing has changed.
        """
        if place not in self._mapped:
            raise IntegrityError(f"{self._range.name}: slot {place} has no memory.")
        pieces = self._pieces(place)
        memory = self._range.physical
        for first, count in runs([p for p in pieces if self._users[p] == 1 and memory[p] != UNMAPPED]):
            self._arena.unmap(self._range, first, count)
        for piece in pieces:
            self._users[piece] -= 1
        self._mapped.remove(place)

    def slot(self, place: int) -> torch.Tensor:
        """The bytes of a slot, uint8 [slot_bytes]; see `PageArena.tensor`."""
        return self._arena.tensor(self._range, place * self._stride, (self._slot_bytes,), torch.uint8)

    def check_integrity(self, places: Iterable[int]) -> None:
        """Exactly these slots have memory, and the pieces under them no more users than they say.

        Raises:
            IntegrityError: it is not so.
        """
        users = [0] * len(self._users)
        for place in places:
            for piece in self._pieces(place):
                users[piece] += 1
        if set(places) != self._mapped or users != self._users:
            raise IntegrityError(f"{self._range.name}: slots {sorted(self._mapped)} have memory, not {sorted(places)}.")
        if self._range.mapped != sum(1 for count in users if count):
            raise IntegrityError(f"{self._range.name}: {self._range.mapped} pieces have memory.")

    def _pieces(self, place: int) -> range:
        return slot_pieces(self._slot_bytes, self._arena.extent_bytes, place, place + 1)
