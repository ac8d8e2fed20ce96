"""Stop strings in a stream of text, wherever the stream is cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until a stop string is complete; holds back only what could become one.

    Of several stop strings the one that is complete first counts; of those complete at the same
    character, the longest. So the result does not depend on how the text arrives in pieces.

    Attributes:
        stopped: a stop string was found; nothing is passed on after it.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_stop
        self._held = ""
        self.stopped = False

    @property
    def watches(self) -> bool:
        """Whether there is anything to look for; if not, all text may be shown as it is."""
        return bool(self._stops)

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Take the next piece of text and return what may be shown.

        Args:
            text: the piece; may be empty.
            armed: whether a stop string may end in this piece (not while `min_tokens` is not reached).
        """
        if self.stopped:
            return ""
        if not self._stops or not text:
            return text
        buffer = self._held + text
        if armed:
            found = self._first_match(buffer, len(self._held))
            if found is not None:
                start, end = found
                self.stopped = True
                self._held = ""
                return buffer[: end if self._include else start]
        keep = self._partial(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """The text held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str, fresh: int) -> tuple[int, int] | None:
        """Start and end of the stop string that ends first in `buffer[fresh:]`."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = buffer.find(stop, max(0, fresh - len(stop) + 1))
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or (end, start) < (best[1], best[0]):
                best = (start, end)
        return best

    def _partial(self, buffer: str) -> int:
        """Characters at the end of `buffer` that a stop string may begin with."""
        keep = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(buffer)), keep, -1):
                if buffer.endswith(stop[:length]):
                    keep = length
                    break
        return keep
