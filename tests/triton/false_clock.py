"""A wall clock that jumps, for child processes: libfaketime, preloaded. The machine's own clock stays as it is.

Python's package `libfaketime` or Debian's `faketime` brings the library; neither is needed for anything else.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

MISSING = "libfaketime is not installed (pip install libfaketime, or Debian's package faketime)"


def library() -> Path | None:
    """The library to preload, if there is one."""
    spec = importlib.util.find_spec("libfaketime")
    homes = [Path(spec.origin).parent / "vendor" / "libfaketime" / "src"] if spec and spec.origin else []
    homes += [*Path("/usr/lib").glob("*/faketime"), Path("/usr/lib/faketime")]
    return next((home / "libfaketime.so.1" for home in homes if (home / "libfaketime.so.1").is_file()), None)


class FalseClock:
    """The clock of processes that are started with `environment`; monotonic time is true, as when a clock is set."""

    def __init__(self, folder: Path, preload: Path) -> None:
        self._file = folder / "clock"
        self.set(0)
        self.environment = {
            "LD_PRELOAD": str(preload),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",  # seconds until a jump is seen
            "DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, offset_s: int) -> None:
        """From now on the clock is `offset_s` seconds ahead of the true time; less than before is a jump backwards.

        Never behind it: Triton's Python backend locks its mutexes with a deadline, and libfaketime does not translate
        deadlines of mutexes. One in the true past would make a lock that somebody holds fail at once, which no clock
        does.
        """
        assert offset_s >= 0
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{offset_s:+d}\n")
        os.replace(fresh, self._file)
