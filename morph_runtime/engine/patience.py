"""How often an engine that has ended is started again, and after which pause."""

from __future__ import annotations

LONGEST_PAUSE_S = 30.0
IN_ALL_FACTOR = 4
"""So many times the starts that may fail of themselves may come to nothing in all. An engine that cannot start will not
start the next time either, but who ends one from outside may leave off, and a request that has ended one is not there
the next time. There is a limit all the same: the kernel's out-of-memory killer looks like somebody who kills, and an
engine that ends whatever it is given like requests that end it."""
MOST_DOUBLINGS = 20


class Patience:
    """Counts the starts in a row that have come to nothing. Not safe for use from several threads.

    Args:
        restarts: of those that may fail of themselves; 0: no start is made at all.
        pause_s: seconds before the second start in a row; doubles with each further one, up to 30 s.
    """

    def __init__(self, restarts: int, pause_s: float) -> None:
        self._restarts, self._pause_s = restarts, pause_s
        self.in_vain = 0
        """Starts in a row that have come to nothing, for whatever reason."""
        self._own = 0
        self._restarted = False

    def well_started(self) -> None:
        """The engine has done some work: counting begins anew."""
        self._own = self.in_vain = 0
        self._restarted = False

    def next_pause_s(self, outside: bool, convicted: bool = False) -> float | None:
        """An engine has ended, or has not started.

        Args:
            outside: somebody else has ended it.
            convicted: a request has ended it, and will not be tried again. The end that made it a suspect was its doing
                too, so failures of the engine's own are counted anew.

        Returns:
            Seconds to wait before the next start; None: there have been too many.
        """
        if self._restarted:
            self.in_vain += 1
            self._own += not outside
        if convicted:
            self._own = 0
        self._restarted = True
        if self._own >= self._restarts or self.in_vain >= self._restarts * IN_ALL_FACTOR:
            return None
        if not self.in_vain:
            return 0.0
        return min(LONGEST_PAUSE_S, self._pause_s * 2.0 ** min(self.in_vain - 1, MOST_DOUBLINGS))
