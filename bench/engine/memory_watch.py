"""How much memory this process has, now and at its most."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from morph_runtime.memory.gpu import GpuMemory
from morph_runtime.memory.smaps import process_rss_bytes

EVERY_S = 0.002


class Memory:
    """NVML's figure of the GPU, less what stood there when this was made; on a CPU the resident set."""

    def __init__(self, device: str) -> None:
        """Make it before the process has a CUDA context."""
        self._gpu = GpuMemory() if device == "cuda" else None

    def used_bytes(self) -> int:
        """Now."""
        return self._gpu.used_bytes() if self._gpu else process_rss_bytes()


class Watch:
    """Asks every 2 ms, in a thread, while the block runs."""

    def __init__(self, memory: Memory) -> None:
        self.most = self.count = 0
        self.seconds = 0.0
        """Of all questions together."""
        self._memory = memory
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            began = time.monotonic()
            self.most = max(self.most, self._memory.used_bytes())
            self.count += 1
            self.seconds += time.monotonic() - began
