"""Several engines behind a balancer that sends each request to the one with the fewest, and perhaps an autoscaler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from morph_runtime.simulate.arrivals import Arrivals
from morph_runtime.simulate.autoscaler import Autoscaler, ScalerSettings
from morph_runtime.simulate.engine import SimulatedEngine
from morph_runtime.simulate.engine_profile import EngineProfile
from morph_runtime.simulate.result import Result, result_of
from morph_runtime.simulate.scenario import Policy, check_lengths

SAMPLE_S = 5.0
"""Between two readings of the queue's length, as Prometheus takes them."""


@dataclass
class Server:
    """One replica: it takes requests from `ready_s` on and until it is to leave; then it serves what it has."""

    engine: SimulatedEngine
    born_s: float
    ready_s: float
    leaving: bool = False
    gone_s: float | None = None


@dataclass(frozen=True)
class FleetResult:
    """What became of a trace.

    Attributes:
        label: what a report calls it.
        ttft_s: float64 [N].
        results: of each server that has served anything.
        gpu_s: seconds for which servers held a GPU, from the wish for one to its end.
        sizes: when the number of servers changed, and to what; those that start count, those that leave do not.
        end_s: when the trace and the last answer were over.
    """

    label: str
    ttft_s: NDArray[np.float64]
    results: list[Result]
    gpu_s: float
    sizes: list[tuple[float, int]] = field(default_factory=list)
    end_s: float = 0.0

    def summary(self, slo_s: float) -> dict[str, Any]:
        """The figures of a table, as plain values."""
        tokens = np.sum([result.tokens_by_level() for result in self.results], axis=0)
        late = self.ttft_s > slo_s
        return {
            "label": self.label,
            "requests": len(self.ttft_s),
            "gpu_hours": self.gpu_s / 3600,
            "servers_most": max(size for _, size in self.sizes),
            "servers_mean": self.gpu_s / max(self.end_s, 1e-9),
            "ttft_s": {f"p{q}": float(np.percentile(self.ttft_s, q)) for q in (50, 95, 99)},
            "slo_s": slo_s,
            "slo_violations": int(late.sum()),
            "slo_violation_share": float(late.mean()),
            "full_precision_share": float(tokens[0] / max(tokens.sum(), 1)),
            "preemptions": sum(result.preemptions for result in self.results),
            "sizes": [[round(at, 3), size] for at, size in self.sizes],
        }


class Fleet:
    """Servers of one kind over one trace."""

    def __init__(self, profile: EngineProfile, policy: Policy, servers: int, scaling: ScalerSettings | None) -> None:
        """`servers` of them at the start; with `scaling` their number changes."""
        self._profile = profile
        self._policy = policy
        self._scaling = scaling
        self._scaler = Autoscaler(scaling) if scaling is not None else None
        self._servers: list[Server] = []
        self._samples: list[tuple[float, float]] = []
        self._sizes: list[tuple[float, int]] = []
        for _ in range(servers):
            self._add(0.0, 0.0)
        self._note(0.0)

    def run(self, arrivals: Arrivals) -> FleetResult:
        """Serve everything.

        Raises:
            ConfigError: a request does not fit an engine.
        """
        check_lengths(self._profile, arrivals)
        next_look_s = SAMPLE_S if self._scaling is not None else np.inf
        columns = (arrivals.arrival_s.tolist(), arrivals.prompt_tokens.tolist(), arrivals.output_tokens.tolist())
        for at_s, prompt, output in zip(*columns, strict=True):
            while next_look_s <= at_s:
                self._look(next_look_s)
                next_look_s += SAMPLE_S
            self._send(at_s, prompt, output)
        while any(server.engine.unfinished for server in self._servers):
            ahead = min(next_look_s, max(server.engine.now_s for server in self._servers) + SAMPLE_S)
            if self._scaling is not None:
                self._look(next_look_s)
                next_look_s += SAMPLE_S
            else:
                self._advance(ahead)
        return self._finish()

    def _add(self, now_s: float, ready_s: float) -> None:
        engine, _ = self._policy.build(self._profile)
        engine.now_s = ready_s
        self._servers.append(Server(engine, now_s, ready_s))

    def _staying(self) -> list[Server]:
        return [server for server in self._servers if not server.leaving]

    def _note(self, now_s: float) -> None:
        size = len(self._staying())
        if not self._sizes or self._sizes[-1][1] != size:
            self._sizes.append((now_s, size))

    def _send(self, at_s: float, prompt: int, output: int) -> None:
        ready = [server for server in self._staying() if server.ready_s <= at_s]
        for server in ready:
            server.engine.run_until(at_s)
        min(ready, key=lambda server: server.engine.unfinished).engine.submit(at_s, prompt, output)

    def _advance(self, now_s: float) -> None:
        for server in self._servers:
            if server.gone_s is None and server.ready_s <= now_s:
                server.engine.run_until(now_s)
                if server.leaving and not server.engine.unfinished:
                    server.gone_s = now_s

    def _look(self, now_s: float) -> None:
        """Take a sample, and every `interval_s` let the autoscaler decide."""
        assert self._scaling is not None and self._scaler is not None
        self._advance(now_s)
        ready = [server for server in self._staying() if server.ready_s <= now_s]
        window_s = self._scaling.window_s
        self._samples.append((now_s, float(np.mean([s.engine.queue.pending(now_s) for s in ready]))))
        self._samples = [sample for sample in self._samples if sample[0] > now_s - window_s]
        if now_s % self._scaling.interval_s >= SAMPLE_S / 2:
            return
        pending = float(np.mean([value for _, value in self._samples]))
        queue_s = float(np.mean([s.engine.queue.mean_wait_s(now_s - window_s, now_s) for s in ready]))
        staying = self._staying()
        wanted = self._scaler.desired(now_s, len(staying), pending, queue_s)
        for _ in range(wanted - len(staying)):
            self._add(now_s, now_s + self._scaling.start_s)
        # Those that are not ready yet go first, then those with the least to do.
        staying.sort(key=lambda server: (server.ready_s <= now_s, server.engine.unfinished))
        for server in staying[: max(0, len(staying) - wanted)]:
            server.leaving = True
            if not server.engine.unfinished:
                server.gone_s = now_s
        self._note(now_s)

    def _finish(self) -> FleetResult:
        served = [server.engine for server in self._servers if len(server.engine.records)]
        end_s = max(max(engine.records.last_s) for engine in served)
        results = [result_of(engine, self._policy.label, self._policy.static_level or 0) for engine in served]
        gpu_s = sum((end_s if server.gone_s is None else server.gone_s) - server.born_s for server in self._servers)
        ttft = np.concatenate([result.ttft_s for result in results])
        return FleetResult(self._policy.label, ttft, results, gpu_s, self._sizes, end_s)
