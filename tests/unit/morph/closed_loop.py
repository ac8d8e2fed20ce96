"""A small engine of numbers for the controller to steer: steps, blocks and layers cost what a cost model says.

It schedules as the real one does (decodes first, then prefill in chunks, admission by free blocks; whoever is preempted
waits in the engine, in front), without prefix cache. What the controller is
shown can be late, and the costs that it knows can be wrong.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from morph_runtime.config import MorphSettings
from morph_runtime.engine.messages import QueueSignal
from morph_runtime.morph.controller import Controller
from morph_runtime.morph.costs import StepCosts, layer_counts
from morph_runtime.morph.estimates import OuterQueue, OutputLengths
from morph_runtime.morph.levels import LevelPlan
from morph_runtime.morph.load import Load, Running, Typical, Waiting

BLOCK = 16
LINE = 2
LAYERS = 16


def make_costs(
    deep: float = 0.7, wide: float = 0.7, ladder: tuple[str, ...] = ("w4",), scale: float = 1.0
) -> StepCosts:
    """Costs of one rung below full: `deep` times as long for one token, `wide` times for many."""
    plan = LevelPlan(range(LAYERS), ladder)  # type: ignore[arg-type]
    tokens = np.array([1.0, 32.0, 128.0, 512.0, 2048.0])
    full = 0.010 + tokens * 1e-4
    rungs = [full] + [0.010 * deep + tokens * 1e-4 * wide for _ in ladder]
    return StepCosts(
        rungs=("full", *ladder), tokens=tokens, whole_s=scale * np.stack(rungs), context_s=scale * 1e-7,
        pair_s=scale * 1e-9, counts=layer_counts(plan), down_s=0.01, up_s=0.03,
    )  # fmt: skip


@dataclass
class Job:
    """A request of the model."""

    arrival_s: float
    prompt: int
    output: int
    slo: int = 0
    computed: int = 0
    made: int = 0
    first_s: float = -1.0
    last_s: float = -1.0
    gap_s: float = 0.0
    """The longest time between two of its tokens."""
    lost_s: float = -1.0
    """When it was preempted, until its next token."""

    def token(self, now_s: float) -> None:
        self.made += 1
        self.lost_s = -1.0
        if self.first_s < 0:
            self.first_s = now_s
        else:
            self.gap_s = max(self.gap_s, now_s - self.last_s)
        self.last_s = now_s

    @property
    def waits_since_s(self) -> float:
        return self.arrival_s if self.lost_s < 0 else self.lost_s

    @property
    def blocks(self) -> int:
        return -(-max(self.prompt + self.made, self.computed) // BLOCK)


@dataclass
class Outcome:
    """What a run was like. `levels` are (time, level), one per step."""

    jobs: list[Job]
    levels: list[tuple[float, int]] = field(default_factory=list)
    preemptions: int = 0

    def ttft(self, slo: int | None = None) -> list[float]:
        return sorted(j.first_s - j.arrival_s for j in self.jobs if j.first_s >= 0 and slo in (None, j.slo))

    def p95(self, slo: int | None = None) -> float:
        times = self.ttft(slo)
        return times[int(0.95 * (len(times) - 1))] if times else 0.0

    def below_full(self, start_s: float) -> float:
        """Share of the steps from then on below full precision."""
        levels = [level for at, level in self.levels if at >= start_s]
        return sum(level > 0 for level in levels) / len(levels)

    @property
    def deepest(self) -> int:
        return max((level for _, level in self.levels), default=0)

    def reversals(self, start_s: float = 0.0) -> int:
        """Changes of direction of the level."""
        path = [level for at, level in self.levels if at >= start_s]
        moves = [b > a for a, b in pairwise(path) if a != b]
        return sum(a != b for a, b in pairwise(moves))


class ClosedLoop:
    """Runs jobs through the model under a controller."""

    def __init__(
        self, controller: Controller, costs: StepCosts, capacities: np.ndarray, *, max_running: int = 64,
        batch: int = 512, late_s: float = 0.0, fixed: int | None = None,
    ) -> None:  # fmt: skip
        self.controller, self.costs, self.capacities = controller, costs, np.asarray(capacities)
        self.max_running, self.batch, self.late_s, self.fixed = max_running, batch, late_s, fixed
        self.now = 0.0
        self.level = fixed or 0
        self.target = self.level
        self._next_layer_s = 0.0
        self.queue: deque[Job] = deque()
        self.running: list[Job] = []
        self.lengths = OutputLengths()
        self.outer = OuterQueue()
        self.preemptions = 0
        self._arrived = 0
        self._prompt = 1.0
        self._signals: deque[QueueSignal] = deque()
        self._loads: deque[Load] = deque()
        self._signal_s = self._next_signal_s = self._next_decision_s = 0.0
        self._counted = 0

    def run(self, jobs: list[Job], until_s: float) -> Outcome:
        """Serve `jobs`, in the order of their arrival, until `until_s` (seconds of the model)."""
        todo = deque(sorted(jobs, key=lambda j: j.arrival_s))
        out = Outcome(jobs)
        while self.now < until_s:
            while todo and todo[0].arrival_s <= self.now:
                self.queue.append(todo.popleft())
                self._arrived += 1
            self._shift()
            if self.fixed is None:
                self._decide()
            if not self._step():
                ahead = todo[0].arrival_s if todo else until_s
                self.now = min(max(ahead, self.now + 1e-6), self.now + 0.05)
            out.levels.append((self.now, self.level))
        out.preemptions = self.preemptions
        return out

    # -- layers ----------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Going up, room is given back first."""
        return int(self.capacities[min(self.level, self.target)])

    @property
    def used(self) -> int:
        return sum(job.blocks for job in self.running)

    def _aim(self, target: int) -> None:
        if target < self.level and self.used > self.capacities[target]:
            return  # refused, as the shifter does
        if target != self.target:
            self.target = target
            each = self.costs.down_s if target > self.level else self.costs.up_s
            self._next_layer_s = self.now + each

    def _shift(self) -> None:
        while self.level != self.target and self.now >= self._next_layer_s:
            down = self.target > self.level
            self.level += 1 if down else -1
            self._next_layer_s += self.costs.down_s if down else self.costs.up_s

    # -- steps -----------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        budget, decodes, prefill, pairs = self.batch, [], 0, 0.0
        for job in list(self.running):
            if job.computed >= job.prompt and job in self.running:
                if (job.prompt + job.made) % BLOCK == 0:
                    while self.used >= self.capacity and job in self.running:
                        self._preempt(self.running[-1])
                if job in self.running:
                    decodes.append(job)
                    budget -= 1
        context = sum(j.prompt + j.made for j in decodes)
        chunks: list[tuple[Job, int]] = []
        for job in self.running:
            if job.computed < job.prompt and budget > 0:
                chunks.append((job, min(budget, job.prompt - job.computed)))
                budget -= chunks[-1][1]
        while budget > 0 and self.queue and len(self.running) < self.max_running:
            job = self.queue[0]
            spare = 1 if self.running else 0
            if self.used + job.blocks + spare > self.capacity:
                break
            self.running.append(self.queue.popleft())
            chunks.append((job, min(budget, job.prompt - job.computed)))
            budget -= chunks[-1][1]
        for job, length in chunks:
            prefill += length
            pairs += length * (job.computed + length / 2)
        if not (decodes or chunks):
            return False
        self.now += self.costs.seconds(self.level, len(decodes), context, prefill, int(pairs))
        for job in decodes:
            job.token(self.now)
        for job, length in chunks:
            job.computed += length
            if job.computed >= job.prompt:
                job.token(self.now)
        for job in [j for j in self.running if j.made >= j.output]:
            self.running.remove(job)
            self.lengths.add(job.output)
        return True

    def _preempt(self, job: Job) -> None:
        self.running.remove(job)
        job.prompt, job.output, job.made, job.computed = job.prompt + job.made, job.output - job.made, 0, 0
        job.lost_s = self.now
        self.queue.appendleft(job)
        self.preemptions += 1

    # -- what the controller sees ----------------------------------------------------------------------------------

    def _decide(self) -> None:
        if self.now >= self._next_signal_s:
            pending = len(self.queue) - len(self._line())
            since_s = max(0.2, self.now - self._signal_s)  # a step may take longer
            self._signals.append(QueueSignal(self.now, pending, 0.0, (self._arrived - self._counted) / since_s))
            self._counted, self._signal_s = self._arrived, self.now
            self._next_signal_s = self.now + 0.2
        if self.now < self._next_decision_s:
            return
        self._next_decision_s = self.now + 0.05
        while self._signals and self._signals[0].taken_s <= self.now - self.late_s:
            self.outer.take(self._signals.popleft())
        self._loads.append(self._load())
        load = self._loads[0]
        while len(self._loads) > 1 and self._loads[1].now_s <= self.now - self.late_s:
            load = self._loads.popleft()
        if self.target > self.level:
            return
        self._aim(self.controller.decide(dataclasses.replace(load, now_s=self.now, level=self.level)))

    def _line(self) -> list[Job]:
        """What waits in the engine."""
        lost = sum(job.lost_s >= 0 for job in self.queue)
        return list(self.queue)[: max(LINE, lost)]

    def _load(self) -> Load:
        line = self._line()
        for job in line:
            self._prompt += 0.1 * (job.prompt - self._prompt)
        run = self.running
        made = np.array([j.made for j in run], dtype=np.int64)
        output = float(self.lengths.left(np.zeros(1, dtype=np.int64), np.full(1, 512))[0])
        return Load(
            now_s=self.now, level=self.level, capacities=self.capacities, used=self.used,
            head_fits=not line or self.used + line[0].blocks + 1 <= self.capacity, block_tokens=BLOCK,
            max_running=self.max_running, max_batched_tokens=self.batch,
            running=Running(
                context=np.array([j.computed + j.made for j in run], dtype=np.int64),
                uncomputed=np.array([max(0, j.prompt - j.computed) for j in run], dtype=np.int64),
                output=self.lengths.left(made, np.full(len(run), 512)),
                blocks=np.array([j.blocks for j in run], dtype=np.int64),
                age_s=np.array([self.now - j.waits_since_s for j in run]),
                begun=np.array([j.first_s >= 0 for j in run], dtype=np.bool_),
                slo=np.array([j.slo for j in run], dtype=np.int64),
            ),
            waiting=Waiting(
                tokens=np.array([j.prompt for j in line], dtype=np.int64),
                cached=np.zeros(len(line), dtype=np.int64),
                blocks=np.array([j.blocks for j in line], dtype=np.int64),
                output=np.full(len(line), output),
                age_s=np.array([self.now - j.waits_since_s for j in line]),
                begun=np.array([j.first_s >= 0 for j in line], dtype=np.bool_),
                slo=np.array([j.slo for j in line], dtype=np.int64),
            ),
            typical=Typical(self._prompt, 0.0, output, (self._prompt + output) // BLOCK + 1, 1.0),
            arrivals_per_s=self.outer.rate.fast, mean_arrivals_per_s=self.outer.rate.slow,
            outer=self.outer.state(self.now), preemptions=self.preemptions,
        )  # fmt: skip


def steady(rate: float, seconds: float, prompt: int, output: int, seed: int = 0, start_s: float = 0.0) -> list[Job]:
    """Poisson arrivals; outputs are geometric with that mean if negative, else fixed."""
    random = np.random.default_rng(seed)
    times = start_s + np.cumsum(random.exponential(1 / rate, int(rate * seconds * 1.5) + 10))
    lengths = random.geometric(-1 / output, len(times)) if output < 0 else np.full(len(times), output)
    return [Job(float(t), prompt, int(n)) for t, n in zip(times, lengths, strict=True) if t < start_s + seconds]


def make_loop(settings: MorphSettings | None = None, *, gain_blocks: int = 12, base: int = 200,
              costs: StepCosts | None = None, known: StepCosts | None = None, **rest: float) -> ClosedLoop:  # fmt: skip
    """A model with `base` blocks and `gain_blocks` more per level; `known` is what the controller thinks it costs."""
    costs = costs or make_costs()
    capacities = base + gain_blocks * np.arange(costs.max_level + 1)
    controller = Controller(settings or MorphSettings(), costs.max_level, known or costs, 512)
    return ClosedLoop(controller, costs, capacities, **rest)  # type: ignore[arg-type]
