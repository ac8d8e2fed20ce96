"""The processes of one run, known by `MORPH_RUN_DIR` in their environment, and their end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from morph_backend.control import RUN_DIR_VARIABLE

PROC = Path("/proc")


class ProcessWatch:
    """Tells whether a process has ended, by a handle of it, so that a reused id does not mislead."""

    def __init__(self, pid: int) -> None:
        try:
            self._handle: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._handle = None

    @property
    def has_ended(self) -> bool:
        """Whether it has; a zombie has."""
        if self._handle is None:
            return True
        poller = select.poll()
        poller.register(self._handle, select.POLLIN)
        return bool(poller.poll(0))

    def close(self) -> None:
        """Let go of the handle."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def processes_of(run_folder: Path) -> list[int]:
    """Process ids whose environment names the run folder; this process never counts."""
    marker = f"{RUN_DIR_VARIABLE}={run_folder}".encode()
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end_processes(run_folder: Path, grace_s: float = 1.0) -> list[int]:
    """End what is left of a run: SIGTERM, then SIGKILL after `grace_s` seconds.

    Returns:
        the process ids that were there.
    """
    left = processes_of(run_folder)
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        alive = processes_of(run_folder)
        if not alive:
            break
        handles = _signal_all(alive, number)
        _wait_all(handles, wait_s)
    return left


def _signal_all(pids: Sequence[int], number: int) -> list[int]:
    """Signal each process through a handle of it, so that a reused id is never hit; returns the handles."""
    handles = []
    for pid in pids:
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(pid)
            handles.append(handle)
            signal.pidfd_send_signal(handle, number)
    return handles


def _wait_all(handles: Sequence[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for handle in handles:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        poller.poll(max(0.0, deadline - time.monotonic()) * 1e3)
        os.close(handle)
