"""Watches the metrics page during a load run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from morph_client import prometheus
from morph_client.errors import MorphError
from morph_client.state import PREFIXES, ServerState


@dataclass(frozen=True)
class TimedState:
    """The server's state ``at_s`` seconds after the start of the run."""

    at_s: float
    state: ServerState


@dataclass
class Samples:
    """What a sampler has seen so far."""

    states: list[TimedState] = field(default_factory=list)
    failures: int = 0
    """Scrapes that did not come back."""
    last_failure: str | None = None

    @property
    def latest(self) -> ServerState | None:
        """The newest state."""
        return self.states[-1].state if self.states else None


async def sample_until(
    stop: asyncio.Event,
    samples: Samples,
    *,
    metrics_url: str,
    model: str = "morph",
    interval_s: float = 0.2,
    on_sample: Callable[[ServerState], None] | None = None,
) -> None:
    """Scrapes every ``interval_s`` seconds until ``stop`` is set. A failed scrape is counted, not raised.

    A busy server may answer late; the samples then lie further apart.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    due = start
    while not stop.is_set():
        try:
            # In a thread: urllib blocks, and the loop must go on reading token streams.
            metrics = await asyncio.to_thread(prometheus.scrape, metrics_url, 5.0, PREFIXES)
        except MorphError as error:
            samples.failures += 1
            samples.last_failure = str(error)
        else:
            state = ServerState.read(metrics, model)
            samples.states.append(TimedState(loop.time() - start, state))
            if on_sample is not None:
                on_sample(state)
        due = max(due + interval_s, loop.time())
        waiting = asyncio.ensure_future(stop.wait())
        await asyncio.wait([waiting], timeout=due - loop.time())
        waiting.cancel()
