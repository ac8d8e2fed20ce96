"""Positional reads straight into a tensor's memory."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from morph_runtime.errors import ConfigError


def read_exactly(fd: int, path: Path, offset: int, destination: Tensor) -> None:
    """Fill `destination` (uint8 [n], contiguous, on CPU) from byte `offset` of an open file. Threads may share `fd`.

    Raises:
        ConfigError: the file, named by `path`, ends early or cannot be read; it was changed after it was opened.
    """
    view = memoryview(destination.numpy().data)
    while view.nbytes:
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read at byte {offset}: {error.strerror}.") from None
        if count == 0:
            raise ConfigError(f"{path} ends at byte {offset}, before the data that it should hold.")
        view = view[count:]
        offset += count
