"""What the controller sees, as numbers, and the running statistics behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from morph_runtime.engine.messages import QueueSignal
from morph_runtime.scheduler import Request, Scheduler

PROBED = 32
"""Waiting requests, from the head of the line, whose shared prefixes are looked up at each reading."""


@dataclass(frozen=True)
class Signals:
    """One reading of the load. Blocks are KV blocks; times are seconds.

    Attributes:
        now_s: monotonic time of the reading.
        level: the level in force.
        capacities: KV blocks at each level, by level.
        used: live blocks, shared ones once; cached blocks are free.
        growth: blocks that the running requests are expected to take yet.
        running: requests that hold blocks; `max_running` of them may.
        waiting: requests in the engine's line; they need `waiting_blocks` besides those they share.
        head_fits: whether the line's first request could be admitted now (true for an empty line).
        pending: requests in the outer queue, None if that is not known.
        request_blocks: blocks of a typical request at its end that it does not share.
        residence_s: how long a typical request holds its blocks.
        preemptions: total since start.
    """

    now_s: float
    level: int
    capacities: Sequence[int]
    used: int
    growth: int
    running: int
    max_running: int
    waiting: int
    waiting_blocks: int
    head_fits: bool
    pending: int | None
    request_blocks: float
    residence_s: float
    preemptions: int

    @property
    def backlog(self) -> int:
        """Requests that wait, here and in the outer queue."""
        return self.waiting + (self.pending or 0)

    @property
    def demand(self) -> float:
        """Blocks that would be live if everything that waits were admitted now."""
        return self.used + self.growth + self.waiting_blocks + (self.pending or 0) * self.request_blocks

    def as_inputs(self) -> dict[str, float]:
        """For the decision log."""
        return {
            "capacity": float(self.capacities[self.level]),
            "used": float(self.used),
            "growth": float(self.growth),
            "running": float(self.running),
            "waiting": float(self.waiting),
            "waiting_blocks": float(self.waiting_blocks),
            "pending": -1.0 if self.pending is None else float(self.pending),
            "request_blocks": round(self.request_blocks, 2),
            "residence_s": round(self.residence_s, 3),
            "demand": round(self.demand, 1),
            "preemptions": float(self.preemptions),
        }


class LoadStatistics:
    """Exponential means over finished requests; they stand in for what Triton's queue does not show (lengths)."""

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self._tokens = 0.0
        self._outputs = 0.0
        self._residence_s = 0.0
        self._seen = False

    def finished(self, request: Request, now_s: float) -> None:
        """Book a request that has ended with output: by itself, by a stop string, or because its client left."""
        weight = self._weight if self._seen else 1.0
        self._seen = True
        self._tokens += weight * (len(request.tokens) - self._tokens)
        self._outputs += weight * (request.output_len - self._outputs)
        self._residence_s += weight * (max(now_s - request.started_s, 1e-3) - self._residence_s)

    def expected_tokens(self, request: Request) -> int:
        """Tokens that a request will hold at its end: its own limit, or the mean output if that is less."""
        most = request.prompt_len + request.sampling.max_tokens
        if not self._seen:
            return most
        likely = request.prompt_len + max(self._outputs, request.output_len + 1, request.sampling.min_tokens)
        return min(most, round(likely))

    def read(
        self, now_s: float, level: int, capacities: Sequence[int], used: int, max_running: int,
        scheduler: Scheduler, queue: QueueSignal | None,
    ) -> Signals:  # fmt: skip
        """The load as it is now; `queue` is None when the outer queue's signal is missing or stale."""
        blocks = scheduler.blocks_for
        running, waiting = scheduler.running, scheduler.waiting()
        ends = [blocks(self.expected_tokens(r)) for r in running]
        shared = [scheduler.shared_blocks(r, level) for r in waiting[:PROBED]]
        usually = sum(shared) // len(shared) if shared else 0
        shared += [usually] * (len(waiting) - len(shared))
        needs = [max(1, blocks(self.expected_tokens(r)) - n) for r, n in zip(waiting, shared, strict=True)]
        own = sum(end - r.shared for end, r in zip(ends, running, strict=True)) + sum(needs)
        typical = own / (len(ends) + len(needs)) if own else float(blocks(max(1, round(self._tokens))))
        # Before anything has ended, and when requests become longer, those that run know better than the mean.
        mean_age_s = sum(now_s - r.started_s for r in running) / len(running) if running else 0.0
        return Signals(
            now_s=now_s,
            level=level,
            capacities=capacities,
            used=used,
            growth=sum(max(0, end - len(r.blocks)) for end, r in zip(ends, running, strict=True)),
            running=len(running),
            max_running=max_running,
            waiting=len(waiting),
            waiting_blocks=sum(needs),
            head_fits=not waiting or scheduler.fits(waiting[0], level),
            pending=None if queue is None else queue.pending,
            request_blocks=typical,
            residence_s=max(self._residence_s, mean_age_s),
            preemptions=scheduler.preemptions,
        )
