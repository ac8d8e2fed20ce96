"""A deterministic engine with the API of `EngineClient`, without a process or a model.

It answers with the prompt's own tokens, over and over, one per step. `seed` scripts its behaviour. While `held` is
set, or the file FAKE_GATE is there, requests start and get their first token, can be cancelled, and do not go on.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

from morph_runtime.config import Defaults, EngineConfig, completed
from morph_runtime.engine.client import EngineListener
from morph_runtime.engine.messages import (
    EngineInfo,
    EngineStats,
    Finished,
    QueueSignal,
    StepOutput,
    Submit,
    TokenDelta,
    TokenLogprobs,
)
from morph_runtime.errors import ConfigError, EngineDown

SEED_STOP_EARLY = 7  # ends with EOS after 3 tokens
SEED_FAIL = 13  # ends with an error after 2 tokens
SEED_CRASH = 666  # the engine goes down
NUM_LAYERS = 4
CACHED_TOKENS = 3
EOS_ID = 0
DEFAULTS = Defaults(budget_gib=0, kv_tokens=8192, max_num_seqs=64, max_num_batched_tokens=512)


class FakeEngine:
    def __init__(self, config: EngineConfig, listener: EngineListener) -> None:
        self.config = completed(config, DEFAULTS)
        self.listener = listener
        self.step_s = float(os.environ.get("FAKE_STEP_MS", "5")) / 1e3
        self.signals: list[QueueSignal] = []
        self.cancelled: list[int] = []
        self.submitted: list[Submit] = []
        self.pid = os.getpid()
        self.held = threading.Event()
        self._gate = os.environ.get("FAKE_GATE", "")
        self._waiting: deque[Submit] = deque()
        self._running: dict[int, tuple[Submit, int]] = {}
        self._finished: list[Finished] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._down = ""
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)

    def start(self, timeout_s: float = 120.0) -> EngineInfo:
        if os.environ.get("FAKE_START_ERROR"):
            raise ConfigError(os.environ["FAKE_START_ERROR"])
        self._thread.start()
        return EngineInfo(
            model=self.config.model.path,
            architecture="FakeForCausalLM",
            device="cpu",
            dtype="bfloat16",
            num_layers=NUM_LAYERS,
            vocab_size=320,
            eos_token_ids=[EOS_ID],
            max_model_len=self.config.model.max_model_len or 512,
            max_num_seqs=self.config.scheduler.max_num_seqs,
            block_tokens=16,
            kv_dtype="bfloat16",
            base_blocks=64,
            level_max=NUM_LAYERS,
            ladder=["w4"],
            budget_bytes=1 << 20,
            start_s=0.0,
            max_num_batched_tokens=self.config.scheduler.max_num_batched_tokens,
        )

    def release_when(self, condition: Callable[[], object]) -> None:
        """Hold no longer once a condition is true, such as that a stream has its first response."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        self.held.clear()

    def submit(self, request: Submit) -> None:
        with self._lock:
            if self._down or self._stop.is_set():
                raise EngineDown(self._down or "The engine is closed.")
            self.submitted.append(request)
            self._waiting.append(request)

    def cancel(self, key: int) -> None:
        with self._lock:
            self.cancelled.append(key)
            known = self._running.pop(key, None) is not None or any(r.key == key for r in self._waiting)
            self._waiting = deque(r for r in self._waiting if r.key != key)
            if known:
                self._finished.append(Finished(key, "cancelled"))

    def publish_queue(self, signal: QueueSignal) -> None:
        self.signals.append(signal)

    def set_mode(self, mode: str = "", cap: float | None = None) -> None:
        pass

    @property
    def ended_from_outside(self) -> bool:
        return False

    def kill(self) -> None:
        self._down = "killed"

    def close(self, drain_s: float = 0.0) -> None:
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        next_stats = 0.0
        while not self._stop.wait(self.step_s):
            out = self._step()
            if out is not None:
                self.listener.on_step(out)
            if self._down:
                self.listener.on_down(self._down)
                return
            if time.monotonic() >= next_stats:
                self.listener.on_stats(self._stats())
                next_stats = time.monotonic() + 0.2

    def _step(self) -> StepOutput | None:
        with self._lock:
            started = []
            while self._waiting and len(self._running) < self.config.scheduler.max_num_seqs:
                request = self._waiting.popleft()
                self._running[request.key] = (request, len(request.resumed))
                started.append(request.key)
            tokens = []
            held = self.held.is_set() or bool(self._gate and os.path.exists(self._gate))
            finished, self._finished = self._finished, []
            for key, (request, done) in list(self._running.items()):
                if held and done > len(request.resumed):
                    continue
                token, reason = self._next(request, done)
                scores = [] if done else self._prompt_logprobs(request)
                levels = [min(done, NUM_LAYERS)]
                tokens.append(TokenDelta(key, [token], levels, self._logprobs(request, token), scores))
                self._running[key] = (request, done + 1)
                if reason:
                    del self._running[key]
                    finished.append(Finished(key, reason, "it went wrong" if reason == "error" else ""))
            if not tokens and not finished:
                return None
            cached = [CACHED_TOKENS] * len(started)
            return StepOutput(started, tokens, finished, len(self._waiting), len(self._running), cached)

    @staticmethod
    def _logprobs(request: Submit, token: int) -> list[TokenLogprobs]:
        """Each token is the second most likely, after EOS."""
        if request.sampling.logprobs is None and not request.sampling.score:
            return []
        likely = [EOS_ID, token][: request.sampling.logprobs or 0]
        return [TokenLogprobs(2, [token, *likely], [-0.5, *[-0.25, -0.5][: len(likely)]])]

    @staticmethod
    def _prompt_logprobs(request: Submit) -> list[TokenLogprobs]:
        """Each token of the prompt has the log probability -1 and, where more are asked for, EOS is likelier."""
        if (top := request.sampling.prompt_logprobs) is None:
            return []
        return [TokenLogprobs(2, [token, EOS_ID][: 1 + top], [-1.0, -0.5][: 1 + top]) for token in request.prompt[1:]]

    def _next(self, request: Submit, done: int) -> tuple[int, str]:
        sampling = request.sampling
        if sampling.seed == SEED_CRASH:
            self._down = "The engine process ended unexpectedly."
        if sampling.seed == SEED_STOP_EARLY and done == 3:
            return EOS_ID, "stop"
        if sampling.seed == SEED_FAIL and done == 1:
            return request.prompt[0], "error"
        return request.prompt[done % len(request.prompt)], "length" if done + 1 >= sampling.max_tokens else ""

    def _stats(self) -> EngineStats:
        running = len(self._running)
        return EngineStats(
            at_s=time.monotonic(),
            level=1,
            mode="balanced",
            layer_bits=[4, 16, 16, 16],
            kv_blocks_capacity=70,
            kv_blocks_used=running,
            waiting=len(self._waiting),
            running=running,
            steps=1,
            step_seconds=0.1,
            preemptions=2,
            shifts_down=3,
            shifts_up=2,
            shift_down_seconds=0.3,
            shift_up_seconds=0.2,
            blocks_migrated=5,
            weights_bytes=1000,
            kv_bytes=2000,
            static_bytes=300,
            free_bytes=10,
            resident_bytes=3310,
            decisions=[],
            decision_counts={"down/kv_wait": 1, "hold/dwell": 7},
            shifts_by_rung={"w4": 3, "full": 2},
        )
