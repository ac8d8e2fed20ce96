"""The layer swapper: one decoder layer at a time changes its rung while the others go on serving.

Every layer owns a reserved address range per rung. A change maps the target's range, fills it in
the background (MorphServe section 4.3 copies it from pinned host memory; here it is quantized from
the weights that are already there, or read from the checkpoint), flips the dispatch at a step
boundary and gives the source's pages back.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from morph_runtime.errors import IntegrityError
from morph_runtime.kernels.rung import Rung
from morph_runtime.memory.arena import PageArena, VirtualRange
from morph_runtime.morph.levels import Transition
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.slots import LayerSlots


class LayerSwapper:
    """Owns the slots of all decoder layers and what is bound to them."""

    def __init__(self, arena: PageArena, slots: LayerSlots, num_layers: int, rungs: Sequence[Rung]) -> None:
        """Reserve addresses for every layer at every rung of `rungs`; no memory is taken yet."""
        self._arena = arena
        self._slots = slots
        self._ranges: dict[tuple[int, Rung], VirtualRange] = {
            (layer, rung): arena.reserve(f"layer{layer}.{rung}", slots.slot_bytes(rung))
            for layer in range(num_layers)
            for rung in rungs
        }
        self._rungs: list[Rung] = ["full"] * num_layers
        self._layers: list[LayerWeights] = []
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-fill")
        self._pending: tuple[Transition, Future[None]] | None = None

    @property
    def layers(self) -> Sequence[LayerWeights]:
        """The weights that the next step uses, by layer number."""
        return self._layers

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The rung of each layer."""
        return tuple(self._rungs)

    def slot_extents(self, rung: Rung) -> int:
        """Physical extents of one layer at a rung."""
        return self._ranges[0, rung].extents

    def load(self) -> None:
        """Map and fill every layer at full precision (at start)."""
        for layer in range(len(self._rungs)):
            slot = self._map(layer, "full")
            self._slots.fill(layer, "full", slot, None)
            self._layers.append(self._slots.bind(layer, "full", slot))

    def begin(self, change: Transition) -> Future[None]:
        """Map the target's slot and start to fill it in the background.

        Returns:
            a future that is done when `commit` may be called.

        Raises:
            ArenaExhausted: too few free extents; nothing has changed.
        """
        if self._pending is not None:
            raise IntegrityError("A layer is already changing.")
        if self._rungs[change.layer] != change.source:
            raise IntegrityError(f"Layer {change.layer} is at {self._rungs[change.layer]}, not at {change.source}.")
        slot = self._map(change.layer, change.target)
        # Quantizing needs the full-precision bytes; from another rung they come from the checkpoint.
        source = self._layers[change.layer] if change.source == "full" else None
        job = self._worker.submit(self._slots.fill, change.layer, change.target, slot, source)
        self._pending = (change, job)
        return job

    def commit(self) -> Transition:
        """Flip the layer's dispatch and give the source's pages back. Call at a step boundary, after the future."""
        if self._pending is None:
            raise IntegrityError("No layer is changing.")
        change, job = self._pending
        self._pending = None
        try:
            job.result()
        except BaseException:
            self._unmap(change.layer, change.target)
            raise
        slot = self._slot(change.layer, change.target)
        self._layers[change.layer] = self._slots.bind(change.layer, change.target, slot)
        self._rungs[change.layer] = change.target
        self._unmap(change.layer, change.source)
        return change

    def slot_bytes_of(self, layer: int) -> torch.Tensor:
        """The raw bytes of a layer's current slot, uint8 [slot_bytes] (for checks)."""
        return self._slot(layer, self._rungs[layer])

    def close(self) -> None:
        """Wait for the background work to end."""
        self._worker.shutdown(wait=True)

    def _slot(self, layer: int, rung: Rung) -> torch.Tensor:
        nbytes = self._slots.slot_bytes(rung)
        return self._arena.tensor(self._ranges[layer, rung], 0, (nbytes,), torch.uint8)

    def _map(self, layer: int, rung: Rung) -> torch.Tensor:
        span = self._ranges[layer, rung]
        self._arena.map(span, 0, span.extents)
        return self._slot(layer, rung)

    def _unmap(self, layer: int, rung: Rung) -> None:
        span = self._ranges[layer, rung]
        self._arena.unmap(span, 0, span.extents)
