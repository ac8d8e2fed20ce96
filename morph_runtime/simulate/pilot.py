"""The real controller at the wheel of a simulated engine: the same readings of the load, made by the same code.

`LoadReader` reads a scheduler; here it reads this one's stand-in, whose requests have the same attributes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from morph_runtime.config import MorphSettings
from morph_runtime.costs.correction import StepCorrection
from morph_runtime.engine.messages import QueueSignal, SamplingParams
from morph_runtime.morph.controller import Controller
from morph_runtime.morph.costs import StepCosts
from morph_runtime.morph.signals import LoadReader
from morph_runtime.simulate.engine import SimulatedEngine

if TYPE_CHECKING:
    from morph_runtime.scheduler import Request, Scheduler


MOST_OBSERVED = 64
"""Steps between two decisions that count for the correction of the costs."""


@dataclass(frozen=True)
class SignalPath:
    """How the outer queue's state gets to the engine. `interval_s`: between readings; `delay_s`: on the way."""

    interval_s: float = 0.2
    delay_s: float = 0.0


class SeenRequest:
    """A request as `LoadReader` looks at it; tokens and blocks are there by their number alone."""

    __slots__ = (
        "arrival_s", "blocks", "cached_tokens", "computed", "expected_output", "key", "limit", "output_len",
        "prompt_len", "sampling", "shared", "slo", "started_s", "tokens",
    )  # fmt: skip

    def __init__(self, key: int, arrival_s: float, prompt: int, output: int) -> None:
        self.key = key
        self.arrival_s = arrival_s
        self.prompt_len = prompt
        self.sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        self.limit = prompt + output
        self.started_s = 0.0
        self.expected_output = 0.0
        self.shared = self.slo = self.cached_tokens = 0
        self.see(prompt, 0, 0, 0)

    def see(self, known: int, output: int, computed: int, blocks: int) -> None:
        """Note how far it is."""
        self.tokens = range(known)
        self.output_len = output
        self.computed = computed
        self.blocks = range(blocks)


class SeenScheduler:
    """The scheduler of a simulated engine as `LoadReader` looks at it."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine
        self._requests: dict[int, SeenRequest] = {}
        self.running: list[SeenRequest] = []

    @property
    def preemptions(self) -> int:
        return self._engine.preemptions

    def waiting(self) -> list[SeenRequest]:
        return self._waiting

    def fits(self, request: SeenRequest, level: int) -> bool:
        return self._engine.fits(request.key)

    def reusable(self, request: SeenRequest, level: int) -> tuple[int, int]:
        """There is no prefix cache."""
        return 0, 0

    def enter(self, key: int) -> SeenRequest:
        """A request has come into the engine."""
        records, queue = self._engine.records, self._engine.queue
        request = SeenRequest(key, queue.left_s(key), records.prompt[key], records.output[key])
        self._requests[key] = request
        return request

    def begin(self, key: int) -> SeenRequest:
        """Its first token is there."""
        request = self._requests[key]
        request.started_s = self._engine.records.start_s[key]
        return request

    def leave(self, key: int) -> SeenRequest:
        """Its last token is there."""
        request = self._requests.pop(key)
        request.output_len = self._engine.records.output[key]
        return request

    def look(self) -> None:
        """See how far each request is now."""
        engine, records, size = self._engine, self._engine.records, self._engine.profile.block_tokens
        self.running = []
        for key in sorted([*engine.decodes.keys, *engine.prefilling]):
            request = self._requests[key]
            if key in engine.decodes:
                computed = engine.decodes.computed(key)
                known = computed + 1
                request.see(known, known - request.prompt_len, computed, -(-computed // size))
            else:
                known = records.known(key)
                request.started_s = records.start_s[key]
                request.see(known, records.produced[key], engine.computed[key], -(-known // size))
            self.running.append(request)
        self._waiting = [self._requests[key] for key in sorted(engine.waiting)]
        for request in self._waiting:
            produced = records.produced[request.key]
            request.see(request.prompt_len + produced, produced, 0, 0)


class Pilot:
    """Decides for one engine; pass `decide` to it."""

    def __init__(self, settings: MorphSettings, costs: StepCosts | None, path: SignalPath) -> None:
        """`costs`: what the controller believes, which may differ from the engine's; None: it has no cost model."""
        self._settings = settings
        self._costs = costs
        self._path = path
        self._engine: SimulatedEngine | None = None
        self._signal: QueueSignal | None = None
        self._correction = StepCorrection(costs) if costs is not None else None
        self._entered = self._begun = self._ended = self._steps = 0

    def decide(self, engine: SimulatedEngine) -> None:
        """As `Engine._decide` does: on the way down nothing is asked."""
        if self._engine is None:
            self._take(engine)
        if engine.shifts.target <= engine.shifts.level:
            self._observe(engine)
            load = self._reader.read(
                engine.now_s, engine.shifts.level, engine.used, cast("Scheduler", self._seen),
                self._newest_signal(engine), self._settings.signal_stale_s, -1.0, self._slowness(engine),
            )  # fmt: skip
            level = self.controller.decide(load)
            engine.shifts.target = engine.shifts.begun if level == load.level else level
            engine.plan_decision(engine.now_s + max(self._settings.interval_s, self.controller.pause_s))
            self.controller.take_decisions()

    @property
    def counts(self) -> dict[str, int]:
        """Decisions by action and reason."""
        return self.controller.counts if self._engine is not None else {}

    def _take(self, engine: SimulatedEngine) -> None:
        profile = engine.profile
        self._engine = engine
        self._seen = SeenScheduler(engine)
        self.controller = Controller(self._settings, profile.max_level, self._costs, profile.max_num_batched_tokens)
        self._reader = LoadReader(
            profile.capacities.tolist(), profile.max_num_seqs, profile.max_num_batched_tokens, profile.block_tokens,
            len(self.controller.classes),
        )  # fmt: skip

    def _observe(self, engine: SimulatedEngine) -> None:
        """Tell the reader what has happened since the last reading."""
        reader, seen, records = self._reader, self._seen, engine.records
        entered = engine.queue.taken
        for key in range(self._entered, entered):
            reader.submitted(cast("Request", seen.enter(key)))
        for key in records.begun[self._begun :]:
            request = cast("Request", seen.begin(key))
            reader.started(request)
            reader.first_token(request, records.first_s[key])
        for key in records.ended[self._ended :]:
            reader.finished(cast("Request", seen.leave(key)), records.last_s[key])
        if engine.steps > self._steps:
            reader.stepped(engine.last_step_s)
        self._entered, self._begun, self._ended = entered, len(records.begun), len(records.ended)
        seen.look()

    def _slowness(self, engine: SimulatedEngine) -> float:
        """How much slower steps are than the costs say. The last step stands for all since the last look."""
        correction, level = self._correction, engine.shifts.level
        if correction is None:
            return 1.0
        if engine.steps > self._steps:
            predicted_s = correction.costs.seconds(level, *engine.last_shape)
            for _ in range(min(engine.steps - self._steps, MOST_OBSERVED)):
                correction.observe(level, predicted_s, engine.last_step_s)
        self._steps = engine.steps
        return correction.ratio(level)

    def _newest_signal(self, engine: SimulatedEngine) -> QueueSignal:
        """The newest reading of Triton's queue that has arrived."""
        every, queue, before = self._path.interval_s, engine.queue, self._signal
        taken_s = (engine.now_s - self._path.delay_s) // every * every
        if before is not None and taken_s <= before.taken_s:
            return before
        pending = queue.pending(taken_s)
        if before is None:
            self._signal = QueueSignal(taken_s, pending)
            return self._signal
        came = queue.arrived(taken_s) - queue.arrived(before.taken_s)
        waited_s = queue.mean_wait_s(before.taken_s, taken_s)
        self._signal = QueueSignal(taken_s, pending, waited_s, came / (taken_s - before.taken_s))
        return self._signal


def quiet_controller() -> None:
    """Keep the controller's log lines, one for each change of level, out of the way of a report."""
    logging.getLogger("morph_runtime.morph.controller").setLevel(logging.ERROR)
