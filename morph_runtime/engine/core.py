"""The engine's heart: `step()` schedules, runs, samples and publishes; between steps layers and KV may change."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from morph_runtime.config import EngineConfig
from morph_runtime.engine.batch import make_batch
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
from morph_runtime.engine.runner import StepRunner
from morph_runtime.kernels.kv_format import KVFormat
from morph_runtime.kernels.rung import RUNG_BITS
from morph_runtime.kv import BlockPool, KVCache
from morph_runtime.memory.arena import PageArena
from morph_runtime.memory.ledger import Ledger
from morph_runtime.memory.smaps import process_rss_bytes
from morph_runtime.models.decoder import Decoder
from morph_runtime.morph.controller import Controller
from morph_runtime.morph.resizer import KVResizer
from morph_runtime.morph.shifter import LevelShifter
from morph_runtime.morph.signals import LoadStatistics
from morph_runtime.morph.swapper import LayerSwapper
from morph_runtime.sampling.sampler import Sampled
from morph_runtime.scheduler import Request, Scheduler, StepPlan
from morph_runtime.weights.spec import ModelSpec


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
    decoder: Decoder
    swapper: LayerSwapper
    resizer: KVResizer
    shifter: LevelShifter
    controller: Controller
    intake: Intake
    runner: StepRunner


class Engine:
    """Single-threaded: one loop calls everything here."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._statistics = LoadStatistics()
        self._queue: QueueSignal | None = None
        self._next_decision_s = 0.0
        self._steps = 0
        self._step_seconds = 0.0
        self._cancelled: list[Finished] = []

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, message: Submit) -> None:
        """Take a request into the waiting line; the serving process has validated it."""
        self._parts.intake.submit(
            Request(
                key=message.key,
                tokens=list(message.prompt),
                prompt_len=len(message.prompt),
                sampling=message.sampling,
                priority=message.priority,
                arrival_s=message.arrival_s,
            )
        )

    def cancel(self, key: int) -> None:
        """End a request and free its blocks at once; an unknown key has ended already."""
        request = self._parts.intake.cancel(key)
        if request is not None:
            if request.output_len:
                # Stop strings are matched outside and end requests this way: their lengths count like any other's.
                self._statistics.finished(request, time.monotonic())
            self._cancelled.append(Finished(key, "cancelled", "", request.preemptions))

    def queue_signal(self, signal: QueueSignal) -> None:
        """What the outer queue shows."""
        self._queue = signal

    def set_mode(self, mode: str) -> None:
        """Change the controller's mode."""
        self._parts.controller.set_mode(mode)

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
        """Whether any request is running or waiting."""
        scheduler = self._parts.scheduler
        return scheduler.num_running > 0 or scheduler.num_waiting > 0 or self._parts.intake.num_compiling > 0

    @property
    def statistics(self) -> LoadStatistics:
        """What finished requests were like."""
        return self._statistics

    @property
    def parts(self) -> EngineParts:
        """The parts, for checks and benchmarks."""
        return self._parts

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self, decide: bool = True) -> StepOutput | None:
        """Run one step; None if there was nothing to run or to tell.

        Args:
            decide: whether the controller may act (scripted level schedules say no).
        """
        began = time.monotonic()
        self._parts.shifter.poll()
        if decide and began >= self._next_decision_s:
            self._decide(began)
        scheduler, intake = self._parts.scheduler, self._parts.intake
        finished, self._cancelled = self._cancelled + intake.admit(), []
        level = self.level
        plan = scheduler.schedule(level)
        for request in plan.started:
            request.started_s = began
        tokens: list[TokenDelta] = []
        if plan.slices:
            sampling, sampled = self._run(plan)
            now = time.monotonic()
            tokens, ended = self._book(plan, sampling, sampled, level, now)
            finished += ended
            self._steps += 1
            self._step_seconds += now - began
        if self._parts.config.check_integrity:
            self.check_integrity()
        if not (plan.slices or finished):
            return None
        return StepOutput(
            started=[r.key for r in plan.started],
            started_cached=[r.cached_tokens for r in plan.started],
            tokens=tokens,
            finished=finished,
            waiting=scheduler.num_waiting + intake.num_compiling,
            running=scheduler.num_running,
        )

    def _run(self, plan: StepPlan) -> tuple[list[Request], Sampled]:
        """Forward and sample; the requests whose next token was asked for, and what was chosen, in their order."""
        batch, sampling = make_batch(plan, self._parts.config.memory.block_tokens)
        rows = [self._parts.intake.row(r) for r in sampling]
        return sampling, self._parts.runner.launch(batch, rows, None).result()

    def _book(
        self, plan: StepPlan, sampling: list[Request], sampled: Sampled, level: int, now: float
    ) -> tuple[list[TokenDelta], list[Finished]]:
        """Give the chosen tokens to their requests; what to tell of them, and the requests that have ended."""
        scheduler, intake = self._parts.scheduler, self._parts.intake
        ended: list[Finished] = []
        for request, detail in intake.failures(sampling):
            plan.slices = [part for part in plan.slices if part.request is not request]
            intake.cancel(request.key)
            ended.append(Finished(request.key, "invalid", detail, request.preemptions))
        gone = {finished.key for finished in ended}
        chosen = {r.key: token for r, token in zip(sampling, sampled.tokens, strict=True) if r.key not in gone}
        for request, reason in scheduler.complete(plan, chosen, level):
            self._statistics.finished(request, now)
            ended.append(Finished(request.key, reason, "", request.preemptions))
            intake.forget(request.key)
        tokens = []
        for at, request in enumerate(sampling):
            if request.key in chosen:
                scores = [sampled.logprobs[at]] if at in sampled.logprobs else []
                tokens.append(TokenDelta(request.key, [chosen[request.key]], [level], scores))
        return tokens, ended

    def _decide(self, now: float) -> None:
        settings, shifter = self._parts.config.morph, self._parts.shifter
        if shifter.target > shifter.level:
            return  # on the way down; asking again half-way would only repeat the decision
        self._next_decision_s = now + settings.interval_s
        queue = self._queue
        if queue is not None and now - queue.taken_s > settings.signal_stale_s:
            queue = None
        signals = self._statistics.read(
            now, self.level, self._parts.capacities, self._parts.pool.num_used,
            self._parts.config.scheduler.max_num_seqs, self._parts.scheduler, queue,
        )  # fmt: skip
        shifter.target = self._parts.controller.decide(signals)

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
            kv_block_bytes=parts.cache.layout.block_bytes,
            base_blocks=parts.capacities[0],
            level_max=len(parts.capacities) - 1,
            ladder=list(parts.config.morph.ladder),
            budget_bytes=parts.ledger.budget_bytes,
            start_s=start_s,
        )

    def stats(self) -> EngineStats:
        """A snapshot; takes the controller's fresh decisions with it."""
        parts = self._parts
        counters = parts.shifter.counters
        by_range = parts.arena.resident_bytes()
        weights = sum(n for name, n in by_range.items() if name.startswith("weights."))
        static = by_range.get("static", 0)
        return EngineStats(
            at_s=time.monotonic(),
            level=self.level,
            mode=parts.controller.mode,
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
        )

    def close(self) -> None:
        """End background work and release the arena."""
        self._parts.intake.close()
        self._parts.swapper.close()
        self._parts.arena.close()
