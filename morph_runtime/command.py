"""How a command of the runtime ends: exit statuses, and errors in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable

from morph_runtime.errors import ConfigError, MorphError

EXIT_USAGE, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130


def run_command(work: Callable[[], None], *, shows_progress: bool = False) -> int:
    """Do the work; the exit status. What a user can mend is one sentence on standard error.

    Args:
        work: what the command does.
        shows_progress: it writes a line of progress to the terminal, which is cleared at the end.
    """
    try:
        work()
    except MorphError as error:
        print(f"morph: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        if shows_progress and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return 0
