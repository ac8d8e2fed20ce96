"""The last minute of a server's states, and the rates and quantiles that follow from it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from morph_client.prometheus import Histogram
from morph_client.state import ServerState

_WINDOW_S = 30.0
_KEPT_DECISIONS = 6


@dataclass(frozen=True)
class Decision:
    """Controller decisions of one kind, seen between two looks or since the server's start."""

    at_s: float
    action: str
    reason: str
    count: int


@dataclass(frozen=True)
class Quantiles:
    """p50 and p95, in seconds; ``None`` without observations."""

    p50: float | None
    p95: float | None


class History:
    """States with the time they were seen at, in seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._states: deque[tuple[float, ServerState]] = deque()
        self._decisions: deque[Decision] = deque(maxlen=_KEPT_DECISIONS)
        self.problem: str | None = None
        """Why the last look failed; ``None`` if it did not."""

    def add(self, at_s: float, state: ServerState) -> None:
        """Takes the next state."""
        if self._states:
            self._note_decisions(at_s, self._states[-1][1], state)
        self._states.append((at_s, state))
        # The oldest state kept is the first one at least a window ago, so that the window is full.
        while len(self._states) > 2 and at_s - self._states[1][0] >= _WINDOW_S:
            self._states.popleft()
        self.problem = None

    def lost(self, problem: str) -> None:
        """The server did not answer."""
        self.problem = problem

    @property
    def now(self) -> ServerState:
        """The newest state. There must be one."""
        return self._states[-1][1]

    @property
    def window_s(self) -> float | None:
        """How far back rates and quantiles reach; ``None`` means to the server's start."""
        return self._states[-1][0] - self._states[0][0] if len(self._states) > 1 else None

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens per second over the window; ``None`` after a single look."""
        window = self.window_s
        if not window:
            return None
        made = self.now.generated_tokens - self._states[0][1].generated_tokens
        return max(0.0, made) / window

    @property
    def ttft(self) -> Quantiles:
        """Time to first token over the window."""
        return self._quantiles(self.now.ttft, self._states[0][1].ttft)

    @property
    def tpot(self) -> Quantiles:
        """Time per output token over the window."""
        return self._quantiles(self.now.tpot, self._states[0][1].tpot)

    @property
    def rung_tokens(self) -> dict[str, float]:
        """Layer-weighted output tokens by rung over the window."""
        if len(self._states) < 2:
            return self.now.tokens_by_rung
        before = self._states[0][1].tokens_by_rung
        return {rung: max(0.0, n - before.get(rung, 0.0)) for rung, n in self.now.tokens_by_rung.items()}

    def decisions(self) -> list[Decision]:
        """The last decisions that changed something, newest first; after one look, all kinds since the start."""
        if len(self._states) > 1:
            return list(reversed(self._decisions))
        at = self._states[-1][0]
        counted = [Decision(at, a, r, round(n)) for (a, r), n in self.now.decisions.items() if n]
        return sorted(counted, key=lambda d: (d.action == "hold", -d.count))[:_KEPT_DECISIONS]

    def age_s(self, decision: Decision) -> float:
        """How long before the newest state a decision was seen."""
        return self._states[-1][0] - decision.at_s

    def _note_decisions(self, at_s: float, before: ServerState, now: ServerState) -> None:
        for (action, reason), count in now.decisions.items():
            new = round(count - before.decisions.get((action, reason), 0.0))
            # Holds are taken many times a second: they would push everything else out.
            if new > 0 and action != "hold":
                self._decisions.append(Decision(at_s, action, reason, new))

    def _quantiles(self, now: Histogram | None, before: Histogram | None) -> Quantiles:
        if now is None:
            return Quantiles(None, None)
        seen = now.since(before) if len(self._states) > 1 else now
        return Quantiles(seen.quantile(0.5), seen.quantile(0.95))
