"""Reads the load off the scheduler and the outer queue's signal, with estimates for what neither shows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from morph_runtime.engine.messages import QueueSignal
from morph_runtime.morph.estimates import Mean, OuterQueue, OutputLengths, Rate
from morph_runtime.morph.load import Floats, Ints, Load, Outer, Running, Typical, Waiting

if TYPE_CHECKING:  # the simulator reads its own engine with this, and loads no tensors
    from morph_runtime.scheduler import Request, Scheduler

PROBED = 8
"""Waiting requests, from the head of the line, that are looked up in the prefix cache at each reading."""
COUNTED = 0.02
"""Weight of a request in the shares of the classes."""


class LoadReader:
    """Running statistics over requests, and readings of the load. Not thread-safe: the step loop alone calls it."""

    def __init__(
        self, capacities: Sequence[int], max_running: int, max_batched_tokens: int, block_tokens: int, classes: int = 1
    ) -> None:
        """`capacities`: KV blocks by level; the limits are those of a step; `classes`: how many there are."""
        self._capacities: Ints = np.asarray(capacities, dtype=np.int64)
        self._max_running = max_running
        self._max_batched_tokens = max_batched_tokens
        self._block_tokens = block_tokens
        self._lengths = OutputLengths()
        self._prompt, self._cached, self._asked = Mean(), Mean(), Mean()
        self._residence_s, self._ttft_s, self._step_s = Mean(), Mean(), Mean()
        self._prompt_error, self._output_error = Mean(), Mean()
        self._shares = np.zeros(classes)
        self._came = 0
        self._own_rate = Rate()
        self._outer = OuterQueue()
        self._outer_s: float | None = None
        self._stalled: dict[int, float] = {}
        """Since when a request that has begun to answer cannot go on, by key."""
        self.signals: dict[str, bool] = {"queue": False}
        """Whether each input is there and fresh."""

    # -- what happens to requests ----------------------------------------------------------------------------------

    def submitted(self, request: Request) -> None:
        """A request has come out of the outer queue: its prompt is seen for the first time."""
        if self._prompt.seen:
            self._prompt_error.add(abs(self._prompt.value - request.prompt_len) / request.prompt_len)
        self._prompt.add(request.prompt_len)
        self._asked.add(request.sampling.max_tokens)
        self._shares *= 1 - COUNTED
        self._shares[request.slo] += COUNTED
        self._came += 1
        if self._lengths.known:
            request.expected_output = float(self._lengths.left(_one(0), _one(request.sampling.max_tokens))[0])

    def started(self, request: Request) -> None:
        """It has been scheduled for the first time."""
        self._cached.add(request.cached_tokens)

    def first_token(self, request: Request, now_s: float) -> None:
        """Its first token is there."""
        self._ttft_s.add(now_s - request.arrival_s)

    def stepped(self, seconds: float) -> None:
        """A step has taken so long."""
        self._step_s.add(seconds)

    def finished(self, request: Request, now_s: float) -> None:
        """Book a request that has ended with output: by itself, by a stop string, or because its client left."""
        self._lengths.add(request.output_len)
        self._residence_s.add(max(now_s - request.started_s, 1e-3))
        if request.expected_output:
            self._output_error.add(abs(request.expected_output - request.output_len) / max(request.output_len, 1))

    # -- readings --------------------------------------------------------------------------------------------------

    @property
    def errors(self) -> dict[str, float]:
        """By how much estimates have differed from the truth of late; what has not been compared yet is not there."""
        means = {"prompt": self._prompt_error, "output": self._output_error, "queue_age": self._outer.age_error}
        return {name: mean.value for name, mean in means.items() if mean.seen}

    def read(
        self, now_s: float, level: int, used: int, scheduler: Scheduler, queue: QueueSignal | None, stale_s: float,
        gpu_used_share: float = -1.0, slowness: float = 1.0,
    ) -> Load:  # fmt: skip
        """The load as it is now.

        Args:
            now_s: monotonic seconds.
            level: in force.
            used: live KV blocks.
            scheduler: has the requests.
            queue: the outer queue's newest signal, however old; None if there has been none.
            stale_s: age at which it no longer counts.
            gpu_used_share: see `Load`.
            slowness: see `Load`.
        """
        running, waiting = scheduler.running, scheduler.waiting()
        stalled = [r.key for r in waiting if r.output_len]
        stalled += [r.key for r in running if r.output_len and len(r.tokens) - r.computed > 1]
        self._stalled = {key: self._stalled.get(key, now_s) for key in stalled}
        self._own_rate.add(self._came, now_s)
        self._came = 0
        outer = self._read_queue(queue, now_s, stale_s)
        rate = self._own_rate if outer is None else self._outer.rate
        mean_age_s = sum(now_s - r.started_s for r in running) / len(running) if running else 0.0
        return Load(
            now_s=now_s,
            level=level,
            capacities=self._capacities,
            used=used,
            head_fits=not waiting or scheduler.fits(waiting[0], level),
            block_tokens=self._block_tokens,
            max_running=self._max_running,
            max_batched_tokens=self._max_batched_tokens,
            running=self._running(running, now_s),
            waiting=self._waiting(waiting, scheduler, level, now_s),
            # Before anything has ended, those that run know better than the mean.
            typical=self._typical(max(self._residence_s.value, mean_age_s)),
            arrivals_per_s=rate.fast,
            mean_arrivals_per_s=rate.slow,
            outer=outer,
            preemptions=scheduler.preemptions,
            ttft_s=self._ttft_s.value,
            step_s=self._step_s.value,
            gpu_used_share=gpu_used_share,
            slowness=slowness,
        )

    def _read_queue(self, queue: QueueSignal | None, now_s: float, stale_s: float) -> Outer | None:
        fresh = queue is not None and now_s - queue.taken_s <= stale_s
        if queue is not None and fresh:
            self._outer.take(queue)
        if fresh != self.signals["queue"]:
            self.signals["queue"] = fresh
            if not fresh:
                logging.getLogger(__name__).warning(
                    "the outer queue's signal is older than %g s: what waits in it is not counted until it is back",
                    stale_s,
                )
        return self._outer.state(now_s) if fresh else None

    def _running(self, requests: Sequence[Request], now_s: float) -> Running:
        context = _array([r.computed for r in requests])
        known = _array([len(r.tokens) for r in requests])
        output = _array([r.output_len for r in requests])
        return Running(
            context=context,
            uncomputed=known - context,
            output=self._lengths.left(output, _array([r.limit for r in requests]) - known),
            blocks=_array([len(r.blocks) - r.shared for r in requests]),
            age_s=self._ages_s(requests, now_s),
            begun=output > 0,
            slo=_array([r.slo for r in requests]),
        )

    def _waiting(self, requests: Sequence[Request], scheduler: Scheduler, level: int, now_s: float) -> Waiting:
        found = [scheduler.reusable(r, level) for r in requests[:PROBED]]
        if len(requests) > PROBED:
            usual = tuple(sum(column) // PROBED for column in zip(*found, strict=True))
            found += [(usual[0], usual[1])] * (len(requests) - PROBED)
        tokens = _array([len(r.tokens) for r in requests])
        cached, shared = np.array(found, dtype=np.int64).reshape(-1, 2).T
        output = _array([r.output_len for r in requests])
        return Waiting(
            tokens=tokens,
            cached=np.minimum(cached, tokens - 1),
            blocks=np.maximum(1, -(-tokens // self._block_tokens) - shared),
            output=self._lengths.left(output, _array([r.limit for r in requests]) - tokens),
            age_s=self._ages_s(requests, now_s),
            begun=output > 0,
            slo=_array([r.slo for r in requests]),
        )

    def _ages_s(self, requests: Sequence[Request], now_s: float) -> Floats:
        """How long each has waited for its next token, if that is its first or a preemption keeps it back."""
        return now_s - np.array([self._stalled.get(r.key, r.arrival_s) for r in requests], dtype=np.float64)

    def _typical(self, residence_s: float) -> Typical:
        prompt, cached = max(self._prompt.value, 1.0), min(self._cached.value, self._prompt.value)
        output = float(self._lengths.left(_one(0), _one(2**40))[0]) if self._lengths.known else self._asked.value
        shares = self._shares / self._shares.sum() if self._shares.any() else np.zeros(0)
        return Typical(
            prompt=prompt,
            cached=cached,
            output=max(output, 1.0),
            blocks=max(1.0, float(np.ceil((prompt - cached + output) / self._block_tokens))),
            residence_s=residence_s,
            slo_shares=shares,
        )


def _array(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _one(value: int) -> Ints:
    return np.array([value], dtype=np.int64)
