"""Feeds an engine and watches its steps, for the benchmarks of this room."""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import SamplingParams, StepOutput, Submit

STUCK_S = 30.0
"""Seconds without a token after which a measurement is given up."""


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of unsorted values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def gaps_ms(steps: Sequence[tuple[float, int]]) -> list[float]:
    """Milliseconds between steps (time, tokens)."""
    return [(after[0] - before[0]) * 1e3 for before, after in itertools.pairwise(steps)]


def spread(gaps: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum of inter-token latencies, ms.

    Raises:
        RuntimeError: there are none.
    """
    if not gaps:
        raise RuntimeError("no two steps in a row decoded the whole batch: it does not fit, or its output is too short")
    return {"p50_ms": statistics.median(gaps), "p99_ms": quantile(gaps, 0.99), "max_ms": max(gaps)}


class HostTime:
    """What the host spends on changing layers since the last `clear`, and on what."""

    def __init__(self) -> None:
        self.polls: list[float] = []
        """Milliseconds at each step boundary."""
        self.ms: Counter[str] = Counter()
        """Of these, by part: `fill` (what enqueues the new bytes), `map` and `unmap` (calls to the driver). Those that
        the arena's thread makes beside the steps: `worker_map`, `worker_unmap`."""
        self.extents: Counter[str] = Counter()

    def clear(self) -> None:
        """Begin anew."""
        for one in (self.polls, self.ms, self.extents):
            one.clear()

    def row(self, quiet_ms: float = 0.0) -> dict[str, float]:
        """For a result; `quiet_ms`: of a step boundary at which nothing changes."""
        total = sum(self.polls) - quiet_ms * len(self.polls)
        parts = {f"host_{name}_ms": self.ms[name] for name in ("map", "unmap", "fill")}
        worker = {f"{name}_ms": self.ms[name] for name in ("worker_map", "worker_unmap")}
        return {
            "host_ms": total, "host_max_ms": max(self.polls), **parts, "host_rest_ms": total - sum(parts.values()),
            **worker, "mapped_extents": self.extents["map"], "unmapped_extents": self.extents["unmap"],
        }  # fmt: skip


@contextmanager
def timed_host(engine: Engine) -> Iterator[HostTime]:
    """Time what changes layers, by wrapping it for a while: some 0.3 us a call."""
    spent = HostTime()
    parts: Any = engine.parts
    arena, shifter, filler = parts.arena, parts.shifter, parts.swapper._filler

    def timed(work: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = work(*arguments)
            note((time.perf_counter() - began) * 1e3, *arguments)
            return result

        return run

    stepping = threading.current_thread()

    def whose(call: str) -> str:
        return call if threading.current_thread() is stepping else f"worker_{call}"

    def mapped(ms: float, address: int, extent: int, count: int) -> None:
        spent.ms[whose("map")] += ms
        spent.extents["map"] += count

    def unmapped(ms: float, address: int, nbytes: int) -> None:
        spent.ms[whose("unmap")] += ms
        spent.extents["unmap"] += nbytes // arena.extent_bytes

    def filled(ms: float, *arguments: Any) -> None:
        spent.ms["fill"] += ms

    wrapped = (
        (shifter, "poll", spent.polls.append), (arena, "_map", mapped), (arena, "_unmap", unmapped),
        (filler, "start", filled),
    )  # fmt: skip
    for owner, name, note in wrapped:
        setattr(owner, name, timed(getattr(owner, name), note))
    try:
        yield spent
    finally:
        for owner, name, _ in wrapped:
            delattr(owner, name)


class Driver:
    """Submits requests of random tokens to one engine and steps it."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
        self.running: set[int] = set()
        """Keys of the requests that have not ended."""
        self._key = 0
        self._random = random.Random(seed)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds at the present level."""
        return self.engine.parts.pool.capacity * self.engine.parts.config.memory.block_tokens

    def submit(self, prompt_len: int, output_len: int, **choice: Any) -> int:
        """One request of random tokens that runs to its limit; greedy unless `choice` (SamplingParams) says else."""
        self._key += 1
        prompt = self._random.choices(range(self.engine.parts.spec.vocab), k=prompt_len)
        sampling = SamplingParams(**{"temperature": 0.0, **choice}, max_tokens=output_len, ignore_eos=True)
        self.engine.submit(Submit(key=self._key, prompt=prompt, sampling=sampling, arrival_s=time.monotonic()))
        self.running.add(self._key)
        return self._key

    def step(self) -> StepOutput | None:
        """One step of the engine."""
        out = self.engine.step(decide=False)
        if out:
            self.running.difference_update(ended.key for ended in out.finished)
        return out

    def steps(self) -> Iterator[tuple[float, int]]:
        """Step to the end: (time, tokens) of every step that gave any.

        Raises:
            RuntimeError: nothing comes any more.
        """
        last = time.monotonic()
        while self.engine.has_requests:
            out = self.step()
            count = sum(len(delta.tokens) for delta in out.tokens) if out else 0
            now = time.monotonic()
            if count:
                yield now, count
                last = time.monotonic()
            elif now - last > STUCK_S:
                raise RuntimeError(f"no token in {STUCK_S:g} s")

    def run(self, until_tokens: int = 0) -> list[tuple[float, int]]:
        """Step to the end, or until so many tokens came: (time, tokens) of every step that gave any."""
        seen, total = [], 0
        for at, count in self.steps():
            seen.append((at, count))
            total += count
            if until_tokens and total >= until_tokens:
                break
        return seen

    def together(self, batch: int) -> list[tuple[float, int]]:
        """Step until one of `batch` sequences has ended: the steps in which all of them decoded. Cancels the others."""
        seen: list[tuple[float, int]] = []
        for at, count in self.steps():
            if count == batch:
                seen.append((at, count))
            elif seen and len(self.running) < batch:
                break
        self.clear()
        return seen

    def clear(self) -> None:
        """End every request."""
        for key in list(self.running):
            self.engine.cancel(key)
        self.running.clear()
        for _ in self.steps():
            pass


class Company:
    """A batch that decodes while something else is measured; started anew when it is about to end."""

    def __init__(self, driver: Driver, batch: int, prompt: int, output: int) -> None:
        """`output`: tokens that a sequence gives at most; less where the KV cache holds less."""
        room = int(0.9 * driver.kv_tokens / batch) - prompt
        self.driver, self.batch, self.prompt, self.output = driver, batch, prompt, min(output, room)
        self._left = 0
        if self.output < 16:
            raise RuntimeError(f"the KV cache holds {driver.kv_tokens} tokens, too few for {batch} sequences")

    def ensure(self, steps: int) -> None:
        """Have all sequences decoding, with so many steps before the first ends (or as many as there can be)."""
        if self._left >= steps:
            return
        self.driver.clear()
        for _ in range(self.batch):
            self.driver.submit(self.prompt, self.output)
        began = 0
        for _, count in self.driver.steps():
            began += 1
            if count == self.batch:
                break
        self._left = self.output - began - 2
        self.alone(3)

    def step(self) -> float:
        """One step, ms of all of it."""
        began = time.monotonic()
        self.driver.step()
        self._left -= 1
        return (time.monotonic() - began) * 1e3

    def alone(self, steps: int) -> list[float]:
        """Milliseconds of some steps."""
        return [self.step() for _ in range(steps)]

    @property
    def left(self) -> int:
        """Steps before the first sequence ends."""
        return self._left
