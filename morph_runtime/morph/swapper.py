"""The layer swapper: decoder layers change their rung while all of them go on serving.

Every rung owns one reserved address range with a slot for each layer, in the order in which layers
change. A change orders memory for the target's slot, has it filled in the background once that is there (MorphServe
section 4.3 copies it from pinned host memory; here it is quantized from the weights that are already there, or read
from the checkpoint), flips the dispatch at a step boundary, and gives the source's pages back once the last step
that read them is over. Several changes may be under way; they flip in the order in which they began.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from morph_runtime.errors import IntegrityError
from morph_runtime.kernels.rung import Rung
from morph_runtime.memory.arena import PageArena
from morph_runtime.memory.fence import Fence
from morph_runtime.memory.moves import Move
from morph_runtime.morph.filling import Filling, LayerFiller
from morph_runtime.morph.levels import Transition
from morph_runtime.morph.slotrange import SlotRange
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.slots import LayerSlots


@dataclass
class Change:
    """A transition under way: its slot gets memory, then bytes."""

    transition: Transition
    mapping: Move
    filling: Filling | None = None
    """None: the memory is not there yet."""


class LayerSwapper:
    """Owns the slots of all decoder layers and what is bound to them."""

    def __init__(
        self,
        arena: PageArena,
        slots: LayerSlots,
        order: Sequence[int],
        rungs: Sequence[Rung],
        filler: LayerFiller,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """Reserve addresses for every layer at every rung of `rungs`; no memory is taken yet.

        Args:
            arena: where they lie.
            slots: how a layer lies in its slot.
            order: all layers in the order in which they change.
            rungs: full precision and those of the ladder.
            filler: fills slots in the background.
            wake: called from another thread when a filling is done.
        """
        self._arena, self._slots, self._filler, self._wake = arena, slots, filler, wake
        self._place = {layer: place for place, layer in enumerate(order)}
        self._ranges: dict[Rung, SlotRange] = {
            rung: SlotRange(arena, f"weights.{rung}", slots.slot_bytes(rung), len(order)) for rung in rungs
        }
        self._rungs: list[Rung] = ["full"] * len(order)
        self._layers: list[LayerWeights] = []
        self._bound: dict[tuple[int, Rung], LayerWeights] = {}  # making the views takes longer than a change may
        self._pending: deque[Change] = deque()
        self._retired: deque[tuple[Transition, Fence]] = deque()

    @property
    def layers(self) -> Sequence[LayerWeights]:
        """The weights that the next step uses, by layer number."""
        return self._layers

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The rung of each layer."""
        return tuple(self._rungs)

    @property
    def num_pending(self) -> int:
        """Changes that have begun and not flipped."""
        return len(self._pending)

    @property
    def has_room(self) -> bool:
        """Whether another change may begin."""
        return len(self._pending) < self._filler.depth

    @property
    def depth(self) -> int:
        """Changes that may be under way at the same time."""
        return self._filler.depth

    @property
    def is_settled(self) -> bool:
        """Nothing is changing, and every page that was given up has been taken back, or is about to be."""
        return not self._pending and not self._retired

    @property
    def is_ready(self) -> bool:
        """Whether `commit` may be called: the oldest change is filled, or has got no memory."""
        if not self._pending:
            return False
        oldest = self._pending[0]
        return oldest.mapping.failed if oldest.filling is None else oldest.filling.done()

    def extents_for(self, change: Transition) -> int:
        """Free extents that `begin` needs for this change."""
        return self._ranges[change.target].missing(self._place[change.layer])

    def can_begin(self, change: Transition) -> bool:
        """Whether there is room for this change now; if nothing is under way, one must fit."""
        if not self.has_room or any(c.transition.layer == change.layer for c in self._pending):
            return False  # down two rungs in one walk: the first must have flipped
        if self._ranges[change.target].is_mapped(self._place[change.layer]):
            return False
        return self.is_settled or self.extents_for(change) <= self._arena.free_extents

    def load(self) -> None:
        """Map and fill every layer at full precision (at start)."""
        for layer in range(len(self._rungs)):
            self._fill_now(layer, "full", self._map(layer, "full"), None)
            self._layers.append(self.bind(layer, "full"))

    def bind(self, layer: int, rung: Rung) -> LayerWeights:
        """Views of a layer's slot at a rung, whether it has memory or not; they stay valid.

        Plain tensors whoever asks first: what a capture makes in inference mode could not be written to outside it.
        """
        bound = self._bound.get((layer, rung))
        if bound is None:
            with torch.inference_mode(False):
                bound = self._bound[layer, rung] = self._slots.bind(layer, rung, self._slot(layer, rung))
        return bound

    @contextmanager
    def borrow(self, layer: int, rung: Rung) -> Iterator[LayerWeights]:
        """A layer at a rung for a while, filled; nothing may be changing, and staging must be free."""
        if rung == self._rungs[layer]:
            yield self._layers[layer]
            return
        mapping = self._map(layer, rung)
        try:
            self._fill_now(layer, rung, mapping, self._layers[layer])
            yield self.bind(layer, rung)
        finally:
            self._ranges[rung].unmap(self._place[layer])

    def begin(self, change: Transition) -> None:
        """Have the target's slot mapped and filled in the background; `fill` goes on where the memory takes a while.

        Raises:
            ArenaExhausted, OSError: too few free extents, or the system refused; nothing has changed.
        """
        if not self.has_room or any(c.transition.layer == change.layer for c in self._pending):
            raise IntegrityError(f"Layer {change.layer} cannot begin to change now.")
        if self._rungs[change.layer] != change.source:
            raise IntegrityError(f"Layer {change.layer} is at {self._rungs[change.layer]}, not at {change.source}.")
        self._pending.append(Change(change, self._map(change.layer, change.target)))
        try:
            self.fill()
        except BaseException:
            self._drop(self._pending.pop())
            raise

    def fill(self) -> None:
        """Start to fill the slots whose memory has come, in the order in which the changes began."""
        for change in self._pending:
            if change.filling is None:
                # Those behind may share a piece of their memory with it.
                if not change.mapping.done() or change.mapping.failed:
                    return
                change.filling = self._start(change.transition)

    def commit(self, behind: Callable[[], Fence]) -> Transition:
        """Flip the oldest change's layer; its source's pages come back with `release`. Call at a step boundary.

        Args:
            behind: makes a fence behind every step that may read the source.

        Raises:
            ConfigError, OSError: it got no memory or could not be filled. This change and those that began after it are
                called off.
        """
        if not self._pending:
            raise IntegrityError("No layer is changing.")
        change, filling = self._pending[0].transition, self._pending[0].filling
        try:
            self._pending[0].mapping.finish()
            assert filling is not None
            filling.finish()
        except BaseException:
            self._call_off()
            raise
        self._pending.popleft()
        self._layers[change.layer] = self.bind(change.layer, change.target)
        self._rungs[change.layer] = change.target
        self._retired.append((change, behind()))
        return change

    def release(self, wait: bool = False) -> bool:
        """Give back the pages of the layer that was flipped first, if no step reads them any more; False if not.

        They count as free at once: who maps them comes behind in the arena's line.
        """
        if not self._retired or not (wait or self._retired[0][1].done()):
            return False
        change, fence = self._retired.popleft()
        fence.wait()
        self._ranges[change.source].unmap(self._place[change.layer])
        return True

    def wait(self) -> None:
        """Wait for what the changes under way need next, if there are any: memory, so that copies follow each other
        without a gap, or else the bytes of the oldest."""
        for change in self._pending:
            if change.filling is None and not change.mapping.failed:
                change.mapping.wait()
                self.fill()
                return
        if self._pending and (oldest := self._pending[0].filling) is not None:
            oldest.wait()

    def slot_bytes_of(self, layer: int) -> torch.Tensor:
        """The raw bytes of a layer's current slot, uint8 [slot_bytes] (for checks)."""
        return self._slot(layer, self._rungs[layer])

    def check_integrity(self) -> None:
        """The mapped slots are those of the layers' rungs, of changes under way and of sources not yet given back.

        Raises:
            IntegrityError: they are not.
        """
        wanted: dict[Rung, set[int]] = {rung: set() for rung in self._ranges}
        for layer, rung in enumerate(self._rungs):
            wanted[rung].add(self._place[layer])
        for change in self._pending:
            wanted[change.transition.target].add(self._place[change.transition.layer])
        for transition, _ in self._retired:
            wanted[transition.source].add(self._place[transition.layer])
        for rung, places in wanted.items():
            self._ranges[rung].check_integrity(places)

    def close(self) -> None:
        """Wait for the background work to end."""
        self._filler.close()

    def _call_off(self) -> None:
        """End every change under way: no layer has flipped, the targets' pages come back."""
        while self._pending:
            self._drop(self._pending.popleft())

    def _drop(self, change: Change) -> None:
        change.mapping.failure()
        if change.filling is not None:
            change.filling.wait()
        self._ranges[change.transition.target].unmap(self._place[change.transition.layer])

    def _start(self, change: Transition) -> Filling:
        """Fill a slot that has memory."""
        # Quantizing needs the full-precision bytes; from another rung they come from the checkpoint.
        source = self._layers[change.layer] if change.source == "full" else None
        slot = self._slot(change.layer, change.target)
        return self._filler.start(self.bind(change.layer, change.target), slot, source, self._wake)

    def _fill_now(self, layer: int, rung: Rung, mapping: Move, source: LayerWeights | None) -> None:
        """Fill a slot and wait for it (at start)."""
        mapping.finish()
        filling = self._filler.start(self.bind(layer, rung), self._slot(layer, rung), source, lambda: None)
        filling.wait()
        filling.finish()

    def _slot(self, layer: int, rung: Rung) -> torch.Tensor:
        return self._ranges[rung].slot(self._place[layer])

    def _map(self, layer: int, rung: Rung) -> Move:
        return self._ranges[rung].map(self._place[layer])
