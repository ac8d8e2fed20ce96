"""What of a process's memory is in use, as its allocator counts: that is what must not grow.

Resident memory also holds what was given back to the allocator, in the arenas and caches of dozens of threads, and
takes an hour to reach its plateau. So the processes are started with a small preloaded library that tells what
`mallinfo2` says, without the caches of threads (which count as in use), and Python takes its objects from malloc.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

COMPILER = "cc"
ANSWER_S = 20.0


class HeapProbe:
    """Builds the library; asks processes that were started with `environment`."""

    def __init__(self, folder: Path) -> None:
        """Put library and answers into `folder`.

        Raises:
            RuntimeError: there is no C compiler.
        """
        if shutil.which(COMPILER) is None:
            raise RuntimeError(f"The heap's figures need a C compiler ({COMPILER}).")
        self._folder = folder
        library = folder / "heap_probe.so"
        source = Path(__file__).with_name("heap_probe.c")
        command = [COMPILER, "-shared", "-fPIC", "-O1", "-pthread", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        self.environment = {
            "LD_PRELOAD": str(library),
            "MORPH_TEST_HEAP": str(folder),
            "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
            "PYTHONMALLOC": "malloc",
        }

    def in_use_mb(self, pid: int) -> float:
        """MB (10^6 bytes) that the process has taken from malloc and not given back.

        Raises:
            TimeoutError: it does not answer; was it started with `environment`?
        """
        told = self._folder / f"{pid}.told"
        told.unlink(missing_ok=True)
        (self._folder / f"{pid}.ask").touch()
        deadline = time.monotonic() + ANSWER_S
        while not told.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {pid} does not tell of its heap")
            time.sleep(0.05)
        return int(told.read_text().split()[0]) / 1e6
