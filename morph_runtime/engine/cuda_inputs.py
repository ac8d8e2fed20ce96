"""The inputs of a step on their way to the GPU: a pinned buffer that the GPU reads, static device tensors.

The host fills a pinned buffer while the GPU still runs the step before; two buffers take turns, and an
event guards each until it has been read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morph_runtime.kernels.cuda.fetch import fetch
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.shape import MOST_ENTRIES, Entries

ALIGNMENT = 256
BUFFERS = 2
"""One is read while the other is filled: one step is in flight at most."""


@dataclass(frozen=True)
class InputField:
    """One array of a step's inputs."""

    name: str
    dtype: Any
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class StepInputs:
    """Arrays of fixed size on the host and, under the same names, tensors on the device."""

    def __init__(self, max_tokens: int, max_sequences: int, max_blocks: int, device: torch.device) -> None:
        """Allocate.

        Args:
            max_tokens: of one step, padding included.
            max_sequences: rows of a step, padding included.
            max_blocks: of the longest block table.
            device: a GPU.
        """
        t, s = max_tokens, max_sequences
        # The block tables come last, so that a step fetches no more of them than it has; before them what few steps
        # fetch: how the rows are shaped.
        fields = (
            InputField("token_ids", np.int64, (t,)), InputField("positions", np.int64, (t,)),
            InputField("slots", np.int64, (t,)), InputField("logits_at", np.int64, (s,)),
            InputField("seeds", np.int64, (s,)), InputField("draws", np.int64, (s,)),
            InputField("temperatures", np.float32, (s,)), InputField("contexts", np.int32, (s,)),
            InputField("starts", np.int32, (s + 1,)), InputField("picks", np.int32, (s, 2)),
            InputField("tiles", np.int32, (t + s, 2)), InputField("top_ps", np.float32, (s,)),
            InputField("top_ks", np.int32, (s,)), InputField("min_ps", np.float32, (s,)),
            InputField("entries", np.int32, (s,)), InputField("entry_tokens", np.int32, (s, MOST_ENTRIES)),
            InputField("entry_biases", np.float32, (s, MOST_ENTRIES)), InputField("tables", np.int32, (s, max_blocks)),
        )  # fmt: skip
        offsets, size = [], 0
        for field in fields:
            offsets.append(size)
            size += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        self._tables_at = offsets[-1]
        self._shapes_at = next(at for field, at in zip(fields, offsets, strict=True) if field.name == "top_ps")
        self._row_bytes = max_blocks * 4
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._pinned = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
        self._events: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._hosts: list[dict[str, NDArray[Any]]] = []
        for pinned in self._pinned:
            raw = pinned.numpy()
            self._hosts.append({
                f.name: raw[at : at + f.nbytes].view(f.dtype).reshape(f.shape)
                for f, at in zip(fields, offsets, strict=True)
            })  # fmt: skip
        self.tensors: dict[str, Tensor] = {
            f.name: self._device[at : at + f.nbytes].view(_torch_type(f.dtype)).view(f.shape)
            for f, at in zip(fields, offsets, strict=True)
        }
        """Static device tensors by name; valid for life."""
        self._turn = 0

    def host(self) -> dict[str, NDArray[Any]]:
        """The arrays to fill for the next step. Waits until the step before the last has read them: it long has."""
        self._turn = (self._turn + 1) % BUFFERS
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        return self._hosts[self._turn]

    def upload(self, sequences: int, blocks: int, *, shapes: bool = False) -> None:
        """Have the device fetch what `host` gave, on the current stream; of the tables, so many rows and columns; how
        rows are shaped only with `shapes`."""
        pinned = self._pinned[self._turn].view(torch.int32)
        flat, rows = self._tables_at // 4, (sequences, self._row_bytes // 4)
        device = self._device.view(torch.int32)
        words = flat if shapes else self._shapes_at // 4
        fetch(pinned[:flat].view(1, flat), device[:flat].view(1, flat), words)
        if blocks:
            count = sequences * rows[1]
            fetch(pinned[flat : flat + count].view(rows), device[flat : flat + count].view(rows), blocks)
        event = self._events[self._turn] or torch.cuda.Event()
        event.record()
        self._events[self._turn] = event


def fill_shapes(
    host: Mapping[str, NDArray[Any]], rows: Sequence[SamplingRow], shaped: Mapping[int, Entries], padded: int
) -> None:
    """Write what the `shaped` rows of a step ask for into `host` (`StepInputs.host`), and of the others up to `padded`
    that they ask for nothing."""
    host["top_ps"][:padded] = 1.0
    host["top_ks"][:padded] = host["min_ps"][:padded] = host["entries"][:padded] = 0
    places = list(shaped)
    params = [rows[at].params for at in places]
    host["top_ps"][places] = [some.top_p for some in params]
    host["top_ks"][places] = [some.top_k for some in params]
    host["min_ps"][places] = [some.min_p for some in params]
    tokens, biases, counts = host["entry_tokens"], host["entry_biases"], host["entries"]
    for at, entries in shaped.items():
        if count := len(entries.tokens):
            tokens[at, :count], biases[at, :count], counts[at] = entries.tokens, entries.biases, count


def _torch_type(dtype: Any) -> torch.dtype:
    return {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}[dtype]
