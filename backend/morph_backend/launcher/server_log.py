"""Triton's log made readable: information is dropped, warnings and errors pass as one line each."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from enum import Enum

_TRITON_LINE = re.compile(r"^([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ [\w.]+:\d+\] ?(.*)$")
_NOISE = re.compile(r"^\s*(\+[-+=]+\+|\|.*\||Signal \(\d+\) received\.)?\s*$")
_HARMLESS = (
    "DCGM",
    "CudaDriverHelper has not been initialized",
    "Failed to initialize NVML",
    "Unable to allocate pinned system memory",
    "CUDA memory pool disabled",
    "Cuda memory pool",
    "no CUDA-capable device",
    "unable to get number of CUDA devices",
    "Unable to get number of CUDA devices",
    "Error getting cuda device",
    "cache dir",
    # Said at the end of many a gRPC stream that ended as it should.
    "HandleCancellation called even when the context was not cancelled",
)
_USAGE = "Usage: tritonserver"
"""After an option that it does not know, Triton prints its manual of some 400 lines."""


class Severity(Enum):
    """How a line of the server's output is treated."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    PLAIN = "plain"
    """Not Triton's: what the model's processes print."""


def classify(line: str) -> tuple[Severity, str]:
    """Severity and clean text of one line of the server's output."""
    text = line.rstrip("\n")
    match = _TRITON_LINE.match(text)
    if match is None:
        return (Severity.INFO if _NOISE.match(text) else Severity.PLAIN), text
    letter, message = match.groups()
    message = message.strip().strip('"').partition("\\n\\nAt:\\n")[0]
    if letter == "I" or any(part in message for part in _HARMLESS):
        return Severity.INFO, message
    return (Severity.WARNING if letter == "W" else Severity.ERROR), message


class LogFilter:
    """Decides what of the server's output is printed, and when.

    While the server starts, its first error and all that follows are held: if the model has said in
    a sentence of its own why it cannot start, nobody needs them. Triton's manual is dropped.
    Safe to use from several threads.
    """

    def __init__(self, show: Callable[[str], None], verbose: bool) -> None:
        self._show = show
        self._verbose = verbose
        self._starting = True
        self._ending = False
        self._manual = False
        self._held: list[str] = []
        self._lock = threading.Lock()

    def feed(self, line: str) -> None:
        """Take one line of the server's output."""
        if self._verbose:
            self._show(line.rstrip("\n"))
            return
        severity, text = classify(line)
        if severity is Severity.INFO or (self._ending and severity is not Severity.PLAIN):
            return
        shown = text if severity is Severity.PLAIN else f"triton {severity.value}: {text}"
        with self._lock:
            self._manual |= self._starting and shown.startswith(_USAGE)
            if self._manual:
                return
            if self._starting and (self._held or severity is Severity.ERROR):
                self._held.append(shown)
            else:
                self._show(shown)

    def ending(self) -> None:
        """An orderly end has begun: what Triton complains of from now on (idle streams) is no news."""
        self._ending = True

    def started(self, *, forget: bool = False) -> None:
        """The start is over: print what was held, or forget it."""
        with self._lock:
            self._starting = False
            held, self._held = self._held, []
            if not forget:
                for line in held:
                    self._show(line)
