"""One run of a comparison: a server of its own, a warm-up, the trace."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from morph_client.aio_client import AsyncMorphClient
from morph_client.compare.configurations import Configuration
from morph_client.decision_log import read_log
from morph_client.loadgen import LoadOptions, Planned, run_load
from morph_client.replay_plan import ReplayPlan
from morph_client.replay_run import Replayed, ReplayWatch, prepare, run_replay
from morph_client.server_process import EmbeddedServer

_LONGEST_RETURN_S = 60.0
_WARM_UPS = 2

Shown = Callable[[Awaitable[Replayed], ReplayWatch, str], Awaitable[Replayed]]
"""Awaits a replay and shows how far it is."""


@dataclass(frozen=True)
class Bench:
    """What all runs of a comparison have in common."""

    plan: ReplayPlan
    environment: Mapping[str, str]
    """Of every server; a configuration's own variables win."""
    folder: Path
    """For the servers' logs."""
    start_timeout_s: float

    def server(self, configuration: Configuration, log: str, more: Mapping[str, str] | None = None) -> EmbeddedServer:
        """A server in this configuration, not yet started."""
        environment = {**self.environment, **configuration.environment, **(more or {})}
        return EmbeddedServer(configuration.mode, self.folder / log, environment=environment)


def measure(bench: Bench, configuration: Configuration, repeat: int, requests: list[Planned], shown: Shown) -> Replayed:
    """Starts the server, warms it up, replays, and ends it. ``requests`` is empty in the first run, which makes them.

    Raises :class:`MorphError` if the server does not start or dies.
    """
    with bench.server(configuration, f"server-{configuration.name.replace(':', '-')}-{repeat + 1}.log") as server:
        server.wait_ready(bench.start_timeout_s)
        plan = replace(bench.plan, repeat=repeat)
        done = asyncio.run(_replay(plan, configuration, server, requests, shown))
        server.check_alive()
        server.stop()
    changes = read_log(server.log_path, done.started_unix_s)
    return replace(done, run=replace(done.run, changes=changes))


async def _replay(
    plan: ReplayPlan, configuration: Configuration, server: EmbeddedServer, requests: list[Planned], shown: Shown
) -> Replayed:
    async with AsyncMorphClient(
        server.grpc_url, metrics_url=server.metrics_url, connections=plan.connections
    ) as client:
        requests = requests or await prepare(plan, client)
        # Prompts that the trace does not have, so that the prefix cache learns nothing of it.
        warm = [replace(r, due_s=0.0, prompt=f"Warm-up {i}. {r.prompt}") for i, r in enumerate(requests[:_WARM_UPS])]
        await run_load(client, warm, options=LoadOptions(deadline_s=plan.deadline_s))
        watch = ReplayWatch()
        settle_s = _LONGEST_RETURN_S if configuration.morphs else 0.0
        running = run_replay(plan, client, requests, watch, label=configuration.label, settle_s=settle_s)
        return await shown(running, watch, configuration.label)
