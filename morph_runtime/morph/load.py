"""The load at one moment, as plain numbers: what the controller decides on and what a simulator can fill.

Arrays run over requests, the most urgent first. Tokens and KV blocks are counts, times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def _ints() -> Ints:
    return np.zeros(0, dtype=np.int64)


def _floats() -> Floats:
    return np.zeros(0)


def _bools() -> Bools:
    return np.zeros(0, dtype=np.bool_)


def suffix_sums(values: Floats | Ints) -> Floats:
    """Entry i is the sum of the values from i on; one entry more than there are values."""
    result = np.zeros(len(values) + 1)
    result[:-1] = np.cumsum(values[::-1])[::-1]
    return result


@dataclass(frozen=True)
class Running:
    """The requests that hold KV blocks, R of them.

    Attributes:
        context: int64 [R], tokens whose keys and values are in the KV cache.
        uncomputed: int64 [R], tokens known beyond these; at most 1 for a request that decodes.
        output: float64 [R], tokens that it is expected to generate yet.
        blocks: int64 [R], blocks that are free when it ends: those it holds less those it shares.
        age_s: float64 [R], since its arrival at the engine's side of the outer queue; if it computes again what a
            preemption has cost it, since that.
        begun: bool [R], its first token is out.
        slo: int64 [R], its class, by index.
    """

    context: Ints = field(default_factory=_ints)
    uncomputed: Ints = field(default_factory=_ints)
    output: Floats = field(default_factory=_floats)
    blocks: Ints = field(default_factory=_ints)
    age_s: Floats = field(default_factory=_floats)
    begun: Bools = field(default_factory=_bools)
    slo: Ints = field(default_factory=_ints)

    def __len__(self) -> int:
        return len(self.context)


@dataclass(frozen=True)
class Waiting:
    """The requests in the engine's own line, W of them, preempted ones among them.

    Attributes:
        tokens: int64 [W], tokens known: the prompt, and the output of a preempted one.
        cached: int64 [W], those of them that the prefix cache holds, so that they are not computed.
        blocks: int64 [W], blocks it takes when it is admitted, besides live ones that it shares.
        output: float64 [W], tokens that it is expected to generate yet.
        age_s: float64 [W], since its arrival at the engine's side of the outer queue, or since it was preempted.
        begun: bool [W], its first token is out (it was preempted).
        slo: int64 [W], its class, by index.
    """

    tokens: Ints = field(default_factory=_ints)
    cached: Ints = field(default_factory=_ints)
    blocks: Ints = field(default_factory=_ints)
    output: Floats = field(default_factory=_floats)
    age_s: Floats = field(default_factory=_floats)
    begun: Bools = field(default_factory=_bools)
    slo: Ints = field(default_factory=_ints)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Outer:
    """What is known of the queue in front of the engine (Triton's).

    Attributes:
        pending: requests in it.
        oldest_s: estimated age of the oldest of them; 0 without any.
    """

    pending: int
    oldest_s: float = 0.0


@dataclass(frozen=True)
class Typical:
    """Estimates for a request that cannot be seen (it is in the outer queue, or has yet to come).

    Attributes:
        prompt: tokens of its prompt.
        cached: those of them that the prefix cache will hold.
        output: tokens that it will generate.
        blocks: blocks that it holds at its end besides shared ones.
        residence_s: how long it holds them.
        slo_shares: float64 [classes], how likely it is of each class; empty: of class 0.
    """

    prompt: float = 1.0
    cached: float = 0.0
    output: float = 1.0
    blocks: float = 1.0
    residence_s: float = 0.0
    slo_shares: Floats = field(default_factory=_floats)


@dataclass(frozen=True)
class Load:
    """One reading of the load.

    Attributes:
        now_s: monotonic time of the reading.
        level: the level in force.
        capacities: int64 [levels], KV blocks at each level.
        used: live blocks, shared ones once; cached blocks are free.
        head_fits: whether the line's first request could be admitted now (true for an empty line).
        block_tokens: tokens per KV block.
        max_running: requests that may hold blocks at the same time.
        max_batched_tokens: tokens of one step.
        arrivals_per_s: requests per second over the last few seconds; the outer queue's figure if it is known, else
            what came to the engine.
        mean_arrivals_per_s: the same over a longer time, to which a burst is expected to return.
        outer: None when the outer queue's signal is missing or stale.
        preemptions: total since start.
        ttft_s: mean TTFT of the last seconds; 0 without any.
        step_s: mean time of the last steps; 0 without any.
        slowness: real over predicted time of the last steps.
        gpu_used_share: share of the GPU's memory in use as NVML shows it; -1 where there is none. For the log alone.
    """

    now_s: float
    level: int
    capacities: Ints
    used: int
    head_fits: bool
    block_tokens: int
    max_running: int
    max_batched_tokens: int
    running: Running = field(default_factory=Running)
    waiting: Waiting = field(default_factory=Waiting)
    typical: Typical = field(default_factory=Typical)
    arrivals_per_s: float = 0.0
    mean_arrivals_per_s: float = 0.0
    outer: Outer | None = None
    preemptions: int = 0
    ttft_s: float = 0.0
    step_s: float = 0.0
    slowness: float = 1.0
    gpu_used_share: float = -1.0

    @property
    def pending(self) -> int:
        """Requests in the outer queue; 0 if that is not known."""
        return 0 if self.outer is None else self.outer.pending

    @property
    def backlog(self) -> int:
        """Requests that wait, here and in the outer queue."""
        return len(self.waiting) + self.pending

    @property
    def shared(self) -> float:
        """Live blocks that no end of one running request frees."""
        return max(0.0, self.used - float(self.running.blocks.sum()))

    @property
    def growth(self) -> float:
        """Blocks that the running requests are expected to take yet."""
        running = self.running
        known = running.context + running.uncomputed
        return float((self._blocks(known + running.output) - self._blocks(known)).sum())

    @property
    def peak(self) -> float:
        """The most blocks that will be live at a time if nothing more comes and whoever was preempted goes on.

        All grow by a token a step, and give theirs back when they end.
        """
        running, stalled = self.running, self.waiting.begun
        left = np.concatenate([running.output, self.waiting.output[stalled]])
        held = np.concatenate([running.blocks, self.waiting.blocks[stalled]]).astype(np.float64)
        if not len(left):
            return float(self.used)
        order = np.argsort(left)
        ends, alive = left[order], len(left) - np.arange(len(left))
        live = suffix_sums(held[order])[:-1] + alive * ends / self.block_tokens
        return self.shared + max(float(held.sum()), float(live.max()))

    @property
    def waiting_blocks(self) -> float:
        """Blocks that the engine's line will take to its end."""
        waiting = self.waiting
        grown = self._blocks(waiting.tokens + waiting.output) - self._blocks(waiting.tokens)
        return float((waiting.blocks + grown).sum())

    def _blocks(self, tokens: Floats | Ints) -> Floats:
        result: Floats = np.ceil(tokens / self.block_tokens)
        return result

    @property
    def demand(self) -> float:
        """Blocks that would be live if everything that waits were admitted now and went to its end."""
        return self.used + self.growth + self.waiting_blocks + self.pending * self.typical.blocks

    def as_inputs(self) -> dict[str, float]:
        """For the decision log."""
        running = self.running
        return {
            "capacity": float(self.capacities[self.level]),
            "base": float(self.capacities[0]),
            "used": float(self.used),
            "growth": round(self.growth),
            "running": float(len(running)),
            "prefill_tokens": float(running.uncomputed[running.uncomputed > 1].sum()),
            "waiting": float(len(self.waiting)),
            "waiting_blocks": float(self.waiting_blocks),
            "waiting_tokens": float((self.waiting.tokens - self.waiting.cached).sum()),
            "pending": -1.0 if self.outer is None else float(self.outer.pending),
            "oldest_s": -1.0 if self.outer is None else round(self.outer.oldest_s, 3),
            "arrivals_per_s": round(self.arrivals_per_s, 3),
            "mean_arrivals_per_s": round(self.mean_arrivals_per_s, 3),
            "typical_prompt": round(self.typical.prompt, 1),
            "typical_output": round(self.typical.output, 1),
            "request_blocks": round(self.typical.blocks, 2),
            "residence_s": round(self.typical.residence_s, 3),
            "demand": round(self.demand, 1),
            "preemptions": float(self.preemptions),
            "ttft_s": round(self.ttft_s, 3),
            "step_s": round(self.step_s, 4),
            "slowness": round(self.slowness, 3),
            "gpu_used_share": round(self.gpu_used_share, 3),
        }
