"""The engine's heart: `step()` schedules, launches, resolves and publishes; between steps layers and KV may change.

With `overlap`, a step is scheduled and launched while the one before it still runs, and that one is resolved after
it (at most one is in flight when `step` returns). Without, each is resolved at once: the same calls in another order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

from morph_runtime.config import EngineConfig
from morph_runtime.costs.correction import StepCorrection
from morph_runtime.engine.batch import make_batch
from morph_runtime.engine.flight import Flight, News
from morph_runtime.engine.histories import Histories
from morph_runtime.engine.intake import Intake
from morph_runtime.engine.messages import (
    EngineInfo,
    EngineStats,
    Finished,
    QueueSignal,
    StepOutput,
    Submit,
    TokenDelta,
)
from morph_runtime.engine.prompt_scores import book_scores, scoring_rows
from morph_runtime.engine.runner import StepRunner
from morph_runtime.kernels.kv_format import KVFormat
from morph_runtime.kernels.rung import RUNG_BITS
from morph_runtime.kv import BlockPool, KVCache
from morph_runtime.memory.arena import PageArena
from morph_runtime.memory.fence import DeviceOrder
from morph_runtime.memory.ledger import Ledger
from morph_runtime.memory.smaps import process_rss_bytes
from morph_runtime.morph.controller import Controller
from morph_runtime.morph.costs import StepCosts
from morph_runtime.morph.resizer import KVResizer
from morph_runtime.morph.shifter import LevelShifter
from morph_runtime.morph.signals import LoadReader
from morph_runtime.morph.swapper import LayerSwapper
from morph_runtime.scheduler import Request, RequestState, Scheduler, StepPlan
from morph_runtime.slo import class_index
from morph_runtime.weights.spec import ModelSpec

NEEDS_VALUES = attrgetter("needs_values")


@dataclass(frozen=True)
class EngineParts:
    """What `build_engine` puts together."""

    config: EngineConfig
    spec: ModelSpec
    dtype: torch.dtype
    kv_format: KVFormat
    ledger: Ledger
    capacities: tuple[int, ...]
    max_model_len: int
    arena: PageArena
    cache: KVCache
    pool: BlockPool
    scheduler: Scheduler
    swapper: LayerSwapper
    resizer: KVResizer
    shifter: LevelShifter
    controller: Controller
    intake: Intake
    runner: StepRunner
    order: DeviceOrder
    gpu_used_share: Callable[[], float]
    costs: StepCosts | None = None
    """What steps and shifts cost; None: not known."""


class Engine:
    """Single-threaded: one loop calls everything here."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        scheduler = parts.config.scheduler
        self._statistics = LoadReader(
            parts.capacities, scheduler.max_num_seqs, scheduler.max_num_batched_tokens,
            parts.config.memory.block_tokens, len(parts.controller.classes),
        )  # fmt: skip
        self._gpu_used_share = -1.0
        self._queue: QueueSignal | None = None
        self._next_decision_s = 0.0
        self._steps = 0
        self._step_seconds = 0.0
        self._resolved_s = 0.0
        self._overlaps = parts.config.overlaps
        self._flight: Flight | None = None
        self._news = News()
        self._histories = Histories()
        self._correction = StepCorrection(parts.costs) if parts.costs is not None else None
        self._hear_starts: Callable[[StepOutput], None] | None = None
        parts.shifter.before_change(self.settle)

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, message: Submit) -> None:
        """Take a request into the waiting line; the serving process has validated it."""
        if message.sampling.history:
            self._histories.begin(message.key)
        request = Request(
            key=message.key,
            tokens=[*message.prompt, *message.resumed],
            prompt_len=len(message.prompt),
            sampling=message.sampling,
            priority=message.priority,
            arrival_s=message.arrival_s,
            slo=class_index(self._parts.controller.classes, message.slo_class),
        )
        self._statistics.submitted(request)
        self._parts.intake.submit(request, message.after)

    def cancel(self, key: int) -> None:
        """End a request; its blocks are free at once or after the step in flight. An unknown key has ended already."""
        request = self._parts.intake.cancel(key)
        self._histories.end(key)
        if request is not None:
            if request.output_len and request.started:  # what an engine before this one began has no times here
                # Stop strings are matched outside and end requests this way: their lengths count like any other's.
                self._statistics.finished(request, time.monotonic())
            self._news.finished.append(Finished(key, "cancelled", "", request.preemptions))

    def queue_signal(self, signal: QueueSignal) -> None:
        """What the outer queue shows."""
        self._queue = signal

    def set_mode(self, mode: str = "", cap: float | None = None) -> None:
        """Change the controller's mode, the cap on the share of levels that it may use, or both."""
        self._parts.controller.set_mode(mode, cap)

    def tell_starts(self, hear: Callable[[StepOutput], None]) -> None:
        """Tell `hear` of requests that are scheduled as soon as they are, not when the step before is over.

        Their places in the line are free from then on: who is next can be here for the step after.
        """
        self._hear_starts = hear

    def set_level(self, level: int) -> None:
        """Go to a level and wait until it is reached; for scripted schedules with mode `off`'s controller asleep."""
        self._parts.shifter.target = level
        self._parts.shifter.settle()

    @property
    def level(self) -> int:
        """The level in force."""
        return self._parts.shifter.level

    @property
    def has_requests(self) -> bool:
        """Whether any request is running or waiting, or what a step sampled is still to be told."""
        scheduler = self._parts.scheduler
        if self._flight is not None or self._news.resolved:
            return True
        return scheduler.num_running > 0 or scheduler.num_waiting > 0 or self._parts.intake.num_held > 0

    @property
    def must_poll(self) -> bool:
        """Layers change on a device that does not tell when it is done: `step` has to be called to get on."""
        return self._parts.order.queues and self._parts.shifter.busy

    @property
    def statistics(self) -> LoadReader:
        """What finished requests were like."""
        return self._statistics

    @property
    def correction(self) -> StepCorrection | None:
        """The cost model beside the steps that have run; None if there is no model."""
        return self._correction

    @property
    def parts(self) -> EngineParts:
        """The parts, for checks and benchmarks."""
        return self._parts

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self, decide: bool = True) -> StepOutput | None:
        """Launch one step and resolve one; None if there was nothing to run or to tell.

        Args:
            decide: whether the controller may act (scripted level schedules say no).
        """
        began = time.monotonic()
        self._parts.shifter.poll()
        if decide and not self._parts.config.morph.pin and began >= self._next_decision_s:
            self._decide(began)
        scheduler, intake = self._parts.scheduler, self._parts.intake
        for refused in intake.admit():
            self._histories.end(refused.key)
            self._news.finished.append(refused)
        if self._flight is not None and (self._flight.needs_values or scheduler.must_preempt):
            self.settle()
        plan = scheduler.schedule(self.level)
        for request in plan.started:
            request.started_s = began
            self._statistics.started(request)
        launched = self._launch(plan, began) if plan.slices else None
        starts = plan.started
        if starts and self._flight is not None and self._hear_starts is not None:
            self._hear_starts(self._output(starts, News(), plan.short_of_blocks))
            starts = []
        self.settle()
        self._flight = launched
        if not self._overlaps:
            self.settle()
        if self._parts.config.check_integrity:
            self.check_integrity()
        news, self._news = self._news, News()
        if not (plan.slices or news.resolved or news.finished):
            return None
        return self._output(starts, news, plan.short_of_blocks)

    def _output(self, starts: Sequence[Request], news: News, short_of_blocks: bool) -> StepOutput:
        scheduler = self._parts.scheduler
        return StepOutput(
            started=[r.key for r in starts],
            started_cached=[r.cached_tokens for r in starts],
            tokens=news.tokens,
            finished=news.finished,
            waiting=scheduler.num_waiting + self._parts.intake.num_held,
            running=scheduler.num_running,
            short_of_blocks=short_of_blocks,
        )

    def settle(self) -> None:
        """Wait for the step in flight and book it; what came of it is told by the next `step`."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._book(flight)

    def _launch(self, plan: StepPlan, began: float) -> Flight:
        """Begin the step of a plan; its requests move on."""
        parts = self._parts
        batch, sampling = make_batch(plan, parts.config.memory.block_tokens)
        rows = parts.intake.rows(sampling)
        previous = self._flight.launched if self._flight is not None else None
        launched = parts.runner.launch(batch, rows + scoring_rows(plan), previous)
        parts.scheduler.advance(plan)
        self._histories.ran(plan, self.level)
        needs_values = any(map(NEEDS_VALUES, rows))
        predicted = self._correction.predict(self.level, batch) if self._correction is not None else 0.0
        return Flight(plan, sampling, launched, self.level, began, needs_values, predicted)

    def _book(self, flight: Flight) -> None:
        """Give the tokens of a step to those of its requests that are still there, and see who has ended."""
        scheduler, intake, news = self._parts.scheduler, self._parts.intake, self._news
        sampled = flight.launched.result()
        now = time.monotonic()
        if flight.needs_values:
            for request, detail in intake.failures(flight.sampling):
                intake.cancel(request.key)
                self._histories.end(request.key)
                news.finished.append(Finished(request.key, "invalid", detail, request.preemptions))
        levels, scores, running = [flight.level], sampled.logprobs, RequestState.RUNNING
        tokens = sampled.tokens[: len(flight.sampling)]
        book_scores(flight.plan, scores, len(tokens))
        told = self._histories.any_kept
        for row, (request, token) in enumerate(zip(flight.sampling, tokens, strict=True)):
            if request.state is running:  # else it has ended since the launch
                own, request.prompt_scores = request.prompt_scores, []
                score = [scores[row]] if row in scores else []
                if request.tokens[request.prompt_len] < 0:  # unknown until `resolve`, whatever runs behind it
                    self._statistics.first_token(request, now)
                history = self._histories.take(request.key) if told else []
                news.tokens.append(TokenDelta(request.key, [token], levels, score, own, history))
        for request, reason in scheduler.resolve(flight.plan, tokens, flight.level):
            self._statistics.finished(request, now)
            news.finished.append(Finished(request.key, reason, "", request.preemptions))
            intake.forget(request.key)
            self._histories.end(request.key)
        news.resolved = True
        self._steps += 1
        seconds = now - max(flight.began_s, self._resolved_s)
        self._step_seconds += seconds
        self._statistics.stepped(seconds)
        self._resolved_s = now
        if self._correction is not None:
            self._correction.observe(flight.level, flight.predicted_s, seconds)

    def _decide(self, now: float) -> None:
        settings, shifter = self._parts.config.morph, self._parts.shifter
        if shifter.target > shifter.level:
            return  # on the way down; asking again half-way would only repeat the decision
        load = self._statistics.read(
            now, self.level, self._parts.pool.num_used, self._parts.scheduler, self._queue, settings.signal_stale_s,
            self._gpu_used_share, 1.0 if self._correction is None else self._correction.ratio(self.level),
        )  # fmt: skip
        level = self._parts.controller.decide(load)
        # To stay is to stop where the layers under way will have changed, not to change them back.
        shifter.target = shifter.begun if level == load.level else level
        self._next_decision_s = now + max(settings.interval_s, self._parts.controller.pause_s)

    # -- what others may know ------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Pages, blocks and block tables agree.

        Raises:
            IntegrityError: they do not.
        """
        self._parts.arena.check_integrity()
        self._parts.swapper.check_integrity()
        self._parts.pool.check_integrity()
        self._parts.scheduler.check_integrity()
        self._parts.intake.check_integrity()

    def info(self, start_s: float) -> EngineInfo:
        """The facts that do not change."""
        parts = self._parts
        return EngineInfo(
            model=parts.config.model.path,
            architecture=parts.spec.architecture,
            device=parts.config.device,
            dtype=str(parts.dtype).removeprefix("torch."),
            num_layers=parts.spec.layers,
            vocab_size=parts.spec.vocab,
            eos_token_ids=list(parts.spec.eos_ids),
            max_model_len=parts.max_model_len,
            max_num_seqs=parts.config.scheduler.max_num_seqs,
            block_tokens=parts.config.memory.block_tokens,
            kv_dtype=parts.kv_format.name,
            base_blocks=parts.capacities[0],
            level_max=len(parts.capacities) - 1,
            ladder=list(parts.config.morph.ladder),
            budget_bytes=parts.ledger.budget_bytes,
            start_s=start_s,
            pin=parts.config.morph.pin,
            max_num_batched_tokens=parts.config.scheduler.max_num_batched_tokens,
        )

    def stats(self) -> EngineStats:
        """A snapshot; takes the controller's fresh decisions with it."""
        parts = self._parts
        self._gpu_used_share = parts.gpu_used_share()
        counters = parts.shifter.counters
        by_range = parts.arena.resident_bytes()
        weights = sum(n for name, n in by_range.items() if name.startswith("weights."))
        static = by_range.get("static", 0)
        return EngineStats(
            at_s=time.monotonic(),
            level=self.level,
            mode="off" if parts.config.morph.pin else parts.controller.mode,
            layer_bits=[RUNG_BITS[r] for r in parts.swapper.rungs],
            kv_blocks_capacity=parts.pool.capacity,
            kv_blocks_used=parts.pool.num_used,
            waiting=parts.scheduler.num_waiting,
            running=parts.scheduler.num_running,
            steps=self._steps,
            step_seconds=self._step_seconds,
            preemptions=parts.scheduler.preemptions,
            shifts_down=counters.down,
            shifts_up=counters.up,
            shift_down_seconds=counters.down_seconds,
            shift_up_seconds=counters.up_seconds,
            blocks_migrated=parts.resizer.blocks_migrated,
            weights_bytes=weights,
            kv_bytes=sum(by_range.values()) - weights - static,
            static_bytes=static,
            free_bytes=parts.arena.free_extents * parts.arena.extent_bytes,
            resident_bytes=process_rss_bytes(),
            decisions=parts.controller.take_decisions(),
            decision_counts=dict(parts.controller.counts),
            shifts_by_rung=dict(counters.by_rung),
            shifts_refused=counters.refused,
            kv_blocks_cached=parts.pool.num_cached,
            prefix_queries=parts.scheduler.prefix_queries,
            prefix_hits=parts.scheduler.prefix_hits,
            cap=parts.controller.cap,
            slo_feasible=parts.controller.slo_feasible,
            signals={**self._statistics.signals, "costs": parts.controller.has_costs},
            estimate_errors=self._statistics.errors,
            computed_tokens=parts.scheduler.computed_tokens,
            clean_tokens=parts.scheduler.clean_tokens,
            gpu_used_share=self._gpu_used_share,
        )

    def close(self) -> None:
        """End background work and release the arena; the step in flight is waited for first."""
        if self._flight is not None:
            self._flight.launched.result()
        self._parts.intake.close()
        self._parts.runner.close()
        self._parts.swapper.close()
        self._parts.arena.close()
