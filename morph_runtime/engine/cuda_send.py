"""Pairs of numbers on their way to the GPU, past whatever copies are queued."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from morph_runtime.kernels.cuda.fetch import fetch

PAIRS = 4096
"""A buffer's; longer lists go by a plain copy."""
BUFFERS = 2


class PairSender:
    """Sends pairs by a kernel that reads pinned memory (see `kernels.cuda.fetch`): KV blocks that move on the way up do
    not wait for the layers that are being copied. One thread at a time, always on the same stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = [torch.zeros(PAIRS, 2, dtype=torch.int64, pin_memory=True) for _ in range(BUFFERS)]
        self._sent = torch.zeros(PAIRS, 2, dtype=torch.int64, device=device)
        self._events: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._turn = 0

    def send(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """The pairs on the device, int64 [len(pairs), 2], in stream order."""
        count = len(pairs)
        if not 0 < count <= PAIRS:
            return torch.tensor(pairs, dtype=torch.int64, device=self._device).view(count, 2)
        self._turn = (self._turn + 1) % BUFFERS
        read = self._events[self._turn] or torch.cuda.Event()
        read.synchronize()  # until the kernel that read this buffer last is over
        pinned = self._pinned[self._turn]
        pinned[:count].copy_(torch.tensor(pairs, dtype=torch.int64))
        # Rows of one length, whatever the count: no kernel is compiled anew.
        fetch(pinned.view(torch.int32).view(1, 4 * PAIRS), self._sent.view(torch.int32).view(1, 4 * PAIRS), 4 * count)
        read.record()
        self._events[self._turn] = read
        return self._sent[:count].clone()
