"""How much of the GPU's memory this process has taken, as NVML shows it."""

from __future__ import annotations

import os
from typing import Any

from morph_runtime.errors import ConfigError
from morph_runtime.memory.ledger import GIB

UNSEEN_SHARE = 0.1
"""Of a GPU's memory that CUDA may not show: what the driver keeps for itself is less."""


class GpuMemory:
    """Measured against what others had taken when this was made, before the process has a CUDA context.

    (NVML's figures by process are not to be had in containers.)
    """

    def __init__(self) -> None:
        """Ask NVML for the GPU that is CUDA's first.

        Raises:
            ConfigError: NVML does not answer.
        """
        import pynvml

        self._nvml: Any = pynvml
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        try:
            pynvml.nvmlInit()
            if first.startswith(("GPU-", "MIG-")):
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(first)
            else:
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)
            self._before = self._used()
        except pynvml.NVMLError as error:
            raise ConfigError(
                f"device is cuda, but NVML does not answer ({error}): check the driver, or set MORPH_DEVICE=cpu."
            ) from error

    def check(self, uuid: str, total_bytes: int) -> None:
        """Make sure that NVML was asked for the GPU that CUDA has opened, `total_bytes` large.

        Raises:
            ConfigError: it was another one, or the whole of one of which CUDA sees a part (MIG).
        """
        if total_bytes < (1 - UNSEEN_SHARE) * self.total_bytes():
            raise ConfigError(
                f"NVML sees a GPU of {self.total_bytes() / GIB:.1f} GiB, CUDA one of {total_bytes / GIB:.1f}: for a part "
                "of a GPU (MIG) set CUDA_VISIBLE_DEVICES to its UUID (nvidia-smi -L)."
            )
        asked = str(self._nvml.nvmlDeviceGetUUID(self._handle))
        if not asked.startswith("MIG-") and asked.removeprefix("GPU-") != uuid.removeprefix("GPU-"):
            raise ConfigError(
                "CUDA and NVML number the GPUs of this machine differently: set CUDA_DEVICE_ORDER=PCI_BUS_ID, or "
                "CUDA_VISIBLE_DEVICES to a GPU's UUID (nvidia-smi -L)."
            )

    def used_bytes(self) -> int:
        """Bytes taken since."""
        return self._used() - self._before

    def total_bytes(self) -> int:
        """Bytes of the GPU."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).total)

    def used_share(self) -> float:
        """Share of the GPU's memory that is taken, by whomever; -1 if NVML does not answer any more."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError:
            return -1.0
        return float(memory.used) / float(memory.total)

    def _used(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
