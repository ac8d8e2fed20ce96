"""How much memory the GPU has, by NVML: no CUDA context is made."""

from __future__ import annotations

import logging
import os

import pynvml


def gpu_memory_bytes() -> int:
    """Total memory of the first GPU that `CUDA_VISIBLE_DEVICES` lets through, in bytes; 0 if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        pynvml.nvmlInit()
        try:
            by_index = visible.isdigit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible)) if by_index else _by_uuid(visible)
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        logging.getLogger(__name__).debug("NVML: %s", error)
        return 0


def _by_uuid(uuid: str) -> object:
    return pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
