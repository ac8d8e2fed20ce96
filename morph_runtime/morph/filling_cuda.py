"""Filling slots on a GPU, on a stream of its own beside the steps.

On the way down the quantized bytes never cross PCIe: the kernels' own `pack` makes them from the
full-precision weights that are on the GPU, all of a layer out of one CUDA graph. It takes a fraction of a
step, so the steps that follow are simply put behind it. On the way up the full precision is copied from
pinned host memory; that takes longer than a step, so the layer flips only when the copy is over. W4 of an
AWQ checkpoint, which cannot be made from the full precision, is copied as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from morph_runtime.engine.cuda_graphs import GraphSet
from morph_runtime.kernels.cuda.fetch import copy_by_kernel
from morph_runtime.kernels.rung import Rung
from morph_runtime.morph.filling import Filling, LayerFiller
from morph_runtime.weights.bound import BoundLinear, LayerWeights
from morph_runtime.weights.hoststore import PinnedStore
from morph_runtime.weights.norms import copy_norms

BOUNCE_BYTES = 32 * 2**20
"""Room on the GPU for rows of full precision that are quantized on their way in (from W8 to W4)."""


class StreamFilling(Filling):
    """Enqueued on the side stream."""

    def __init__(self, event: torch.cuda.Event, steps: torch.cuda.Stream, at_once: bool) -> None:
        """`at_once`: steps may be put behind it before it is over."""
        self._event, self._steps, self._at_once = event, steps, at_once

    def done(self) -> bool:
        """See `Filling.done`."""
        return self._at_once or bool(self._event.query())

    def wait(self) -> None:
        """See `Filling.wait`."""
        self._event.synchronize()

    def finish(self) -> None:
        """See `Filling.finish`."""
        self._steps.wait_event(self._event)


class StreamFiller(LayerFiller):
    """Quantizes on the GPU, copies over PCIe."""

    def __init__(
        self, store: PinnedStore, steps: torch.cuda.Stream, depth: int, graphs: GraphSet | None = None
    ) -> None:
        """Make the side stream.

        Args:
            store: what is copied: the full precision, and W4 if it comes from an AWQ checkpoint.
            steps: the stream on which steps run.
            depth: changes that may be under way at the same time.
            graphs: empty, to be filled by `capture`; None: nothing is captured, each kernel is launched by itself.
        """
        self._store, self._steps, self._depth, self._graphs = store, steps, depth, graphs
        self._stream = torch.cuda.Stream(priority=0)
        self._bounce = torch.empty(BOUNCE_BYTES, dtype=torch.uint8, device=steps.device)

    @property
    def depth(self) -> int:
        """As many as the settings say: they queue on one stream."""
        return self._depth

    def start(
        self, target: LayerWeights, slot: Tensor, source: LayerWeights | None, wake: Callable[[], None]
    ) -> Filling:
        """See `LayerFiller.start`; `wake` is not called, since the loop polls while layers change."""
        with torch.cuda.stream(self._stream):
            stored = self._store.find(target.layer, target.rung)
            if stored is not None:
                slot[: stored.shape[0]].copy_(stored, non_blocking=True)
            elif source is None:
                self._quantize_from_host(target)
            elif self._graphs is not None and (target.layer, target.rung) in self._graphs:
                self._graphs.replay((target.layer, target.rung))
            else:
                self._quantize(target, source)
            event = torch.cuda.Event()
            event.record(self._stream)
        return StreamFilling(event, self._steps, at_once=stored is None and source is not None)

    def capture(self, bind: Callable[[int, Rung], LayerWeights], layers: int, rungs: Sequence[Rung]) -> None:
        """Capture how each layer is quantized, and run that once, so that no change of a layer is its graph's first.

        Each rung must have been filled once, which compiles its kernels. On this stream, for a graph's kernels keep the
        priority of the stream that they were captured on.

        Args:
            bind: a layer at a rung. Full precision is there; the other slots have memory for now, and are written to.
            layers: of the model.
            rungs: full precision and those of the ladder.
        """
        if self._graphs is None:
            return
        for key in product(range(layers), rungs):
            if self._store.find(*key) is None:
                work = partial(self._quantize, bind(*key), bind(key[0], "full"))
                self._graphs.capture(key, self._stream, work)
                with torch.cuda.stream(self._stream):
                    self._graphs.replay(key)
        self._stream.synchronize()

    def close(self) -> None:
        """See `LayerFiller.close`; frees the graphs, unpins the host memory."""
        self._stream.synchronize()
        if self._graphs is not None:
            self._graphs.close()
        self._store.close()

    def _quantize(self, target: LayerWeights, source: LayerWeights) -> None:
        """All on the GPU. Kernels alone, and they allocate nothing: a graph of them owns no memory."""
        copy_norms(source, target, copy_by_kernel)
        for full, linear in zip(source.linears, target.linears, strict=True):
            if linear.bias is not None and full.bias is not None:
                copy_by_kernel(full.bias, linear.bias)
            linear.kernel.pack(full.tensors["weight"], linear.tensors)

    def _quantize_from_host(self, target: LayerWeights) -> None:
        origin = self._store.full(target.layer)
        copy_norms(origin, target)
        for full, linear in zip(origin.linears, target.linears, strict=True):
            if linear.bias is not None and full.bias is not None:
                linear.bias.copy_(full.bias, non_blocking=True)
            self._pack_from_host(full, linear)

    def _pack_from_host(self, full: BoundLinear, linear: BoundLinear) -> None:
        """Row by row through the bounce buffer, in stream order."""
        rows = full.tensors["weight"]
        total, columns = rows.shape
        step = self._bounce.nbytes // (columns * rows.itemsize) // linear.kernel.row_step * linear.kernel.row_step
        room = self._bounce[: step * columns * rows.itemsize].view(rows.dtype).view(step, columns)
        for first in range(0, total, step):
            part = rows[first : first + step]
            room[: len(part)].copy_(part, non_blocking=True)
            linear.kernel.pack(room[: len(part)], linear.tensors, first)
