"""CUDA graphs of steps: one for a whole step of decodes where all layers are at one rung, one per layer and rung else.

A level is reached layer by layer, so a graph for every level and batch size would be thousands. Where every layer
has the same rung (no load, or the end of a rung) one graph holds the step; in between a step is a chain of short
graphs, which costs the GPU about 2.6 us a layer. Steps with prompt tokens come out of such short graphs too, padded to
`step_sizes`: launched one by one, a layer's kernels would take the host 0.4 to 0.8 ms, more than the GPU needs for a
thousand tokens. All are captured at start, for addresses never change; a capture runs nothing, so the slots need no
memory of their own (`CudaPageArena.backed`).
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

MAX_SIZES = 16
STEP_SIZES = (64, 128, 256, 384, 512)
"""The smallest sizes of steps with prompt tokens: fewer tokens take as long, for weights must be read in any case."""
FINEST = 256
"""Beyond these, sizes are so many tokens apart, or a quarter of a power of two if that is more."""

GRAPH_BYTES = 128 * 2**10
"""What a graph of one layer takes of GPU memory: about 75 KB, and 4 KB a node (bench/engine)."""
ROOMS_BYTES = 64 * 2**20
"""What the layers' graphs with a second room may take: five sizes of a model of 32 layers and 3 rungs."""


def graph_sizes(max_sequences: int) -> tuple[int, ...]:
    """Batch sizes to capture, ascending, at most 16 of them; a step is padded to the next.

    1, 2, 4, 8, then in steps of 8 to 32, of 16 to 96, of 32 to 256, and of an eighth of the greatest beyond.
    """
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_sequences:
        last = sizes[-1]
        sizes.append(last + (8 if last < 32 else 16 if last < 96 else 32 if last < 256 else max_sequences // 8))
    return _thinned(sizes, max_sequences, kept=3)


def step_sizes(max_tokens: int) -> tuple[int, ...]:
    """Numbers of tokens that steps with prompt tokens are padded to, ascending, at most 16 of them, for the largest."""
    sizes = list(STEP_SIZES)
    while sizes[-1] < max_tokens:
        last = sizes[-1]
        sizes.append(last + max(FINEST, (1 << (last.bit_length() - 1)) // 4))
    return _thinned(sizes, max_tokens, kept=1)


def _thinned(sizes: Sequence[int], most: int, kept: int) -> tuple[int, ...]:
    """Those of ascending sizes below `most`, and it; of more than MAX_SIZES the first `kept` and as many others."""
    fit = [*(n for n in sizes if n < most), most]
    while len(fit) > MAX_SIZES:  # drop where the next size wastes least
        del fit[min(range(kept, len(fit) - 1), key=lambda i: fit[i + 1] / fit[i - 1])]
    return tuple(fit)


def coarse_steps(sizes: Sequence[int]) -> tuple[int, ...]:
    """Those of `step_sizes` whose layers have graphs of their own: few, for a graph takes about
    100 KB of GPU memory, however short."""
    kept = [sizes[-1]]
    for size in reversed(sizes[:-1]):
        if 3 * size <= 2 * kept[-1] and size > STEP_SIZES[0]:
            kept.append(size)
    return tuple(reversed(kept))


def roomy_steps(sizes: Sequence[int], graphs: int) -> tuple[int, ...]:
    """The largest of `coarse_steps`: their layers have a second graph, with the usual room (`cuda_attention.rooms`).

    Args:
        sizes: `coarse_steps`.
        graphs: to be captured for a size: layers times rungs.
    """
    count = min(len(sizes), ROOMS_BYTES // (GRAPH_BYTES * graphs))
    return tuple(sizes[len(sizes) - count :])


def next_size(sizes: Sequence[int], count: int) -> int:
    """The smallest of ascending `sizes` that holds `count`; 0: none does."""
    at = bisect_left(sizes, count)
    return sizes[at] if at < len(sizes) else 0


def coarse_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """The powers of two among batch sizes, and the largest: quantized layers have graphs of these alone.

    Their kernels' tiles hold a power of two of rows, so sizes between would cost as much as the next.
    """
    return tuple(size for size in sizes if size & (size - 1) == 0 or size == sizes[-1])


class GraphSet:
    """Captured graphs by key. They share one memory pool: they are replayed one at a time, in one stream's order."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[object, ...], torch.cuda.CUDAGraph] = {}

    def capture(self, key: tuple[object, ...], stream: torch.cuda.Stream, work: Callable[[], object]) -> None:
        """Capture what `work` enqueues; nothing runs. Its results live in the pool until the next capture's."""
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # freeing another graph in the middle of a capture would end it
        # Not torch.cuda.graph: that collects garbage and empties the cache around each of hundreds of captures.
        with torch.cuda.stream(stream):
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                except BaseException:
                    with suppress(RuntimeError):  # it may have ended; the first error is the one to see
                        graph.capture_end()
                    if not self._graphs:  # PyTorch has given up a pool that no graph has
                        self._pool = torch.cuda.graph_pool_handle()
                    raise
                graph.capture_end()
            finally:
                if collecting:
                    gc.enable()
        self._graphs[key] = graph

    def __contains__(self, key: tuple[object, ...]) -> bool:
        """Whether there is a graph under this key."""
        return key in self._graphs

    def replay(self, key: tuple[object, ...]) -> None:
        """Run a graph on the current stream; there is one under this key."""
        self._graphs[key].replay()

    def close(self) -> None:
        """Free all graphs."""
        self._graphs.clear()
