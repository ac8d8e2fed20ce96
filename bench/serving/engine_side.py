"""The engine without Triton: its own process, messages over its socket, the arrival of every token noted."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from served import Prompts

from morph_client.stats import RequestRecord
from morph_runtime.config import EngineConfig
from morph_runtime.engine.client import EngineClient
from morph_runtime.engine.messages import EngineInfo, EngineStats, SamplingParams, StepOutput, Submit


@dataclass
class Heard:
    """What came for one request; times are time.monotonic's."""

    due_s: float
    prompt_tokens: int
    sent_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(when, tokens)"""
    level0: int = 0
    max_level: int = 0
    ended: str = ""

    @property
    def tokens(self) -> int:
        """That have come."""
        return sum(count for _, count in self.arrivals)

    def record(self, index: int, start_s: float) -> RequestRecord:
        """As the client's load generator has it; times from `start_s`."""
        first, last = (self.arrivals[0][0], self.arrivals[-1][0]) if self.arrivals else (None, None)
        return RequestRecord(
            index=index, due_s=self.due_s, sent_s=self.sent_s - start_s, prompt_tokens=self.prompt_tokens,
            output_tokens=self.tokens, first_s=None if first is None else first - start_s,
            last_s=None if last is None else last - start_s, level0_tokens=self.level0, max_level=self.max_level,
            rung_share=None, error=None if self.ended == "length" else self.ended or "no end",
        )  # fmt: skip


class EngineSide:
    """An engine process, and who listens to it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._client = EngineClient(EngineConfig.from_mapping(settings), self)
        self._requests: dict[int, Heard] = {}
        self._open: set[int] = set()
        self._free = threading.Condition()
        self._down = ""
        self._key = 0
        self.states: list[EngineStats] = []

    def start(self, timeout_s: float) -> EngineInfo:
        """Spawn it; seconds of its start are in the answer."""
        return self._client.start(timeout_s)

    def close(self) -> None:
        """End it."""
        self._client.close()

    def set_mode(self, mode: str) -> None:
        """Of the controller."""
        self._client.set_mode(mode)

    # -- what the engine says --------------------------------------------------------------------------------

    def on_step(self, out: StepOutput) -> None:
        """Note arrivals."""
        now = time.monotonic()
        for delta in out.tokens:
            heard = self._requests[delta.key]
            heard.arrivals.append((now, len(delta.tokens)))
            heard.level0 += delta.levels.count(0)
            heard.max_level = max(heard.max_level, *delta.levels)
        if out.finished:
            with self._free:
                for end in out.finished:
                    self._requests[end.key].ended = end.reason
                    self._open.discard(end.key)
                self._free.notify_all()

    def on_stats(self, stats: EngineStats) -> None:
        """Keep the snapshot."""
        self.states.append(stats)

    def on_down(self, reason: str) -> None:
        """Nothing more will come."""
        with self._free:
            self._down = reason
            self._free.notify_all()

    # -- load --------------------------------------------------------------------------------------------------

    def run(self, plan: Sequence[tuple[float, list[int], int]], limit_s: float) -> tuple[float, list[Heard]]:
        """Send requests (due seconds, prompt, output tokens) when they are due; when it began, and what came.

        Raises:
            SystemExit: the engine has ended, or the answers took longer than `limit_s` seconds.
        """
        heard = [Heard(due, len(prompt)) for due, prompt, _ in plan]
        start = time.monotonic()
        for one, (due, prompt, output) in zip(heard, plan, strict=True):
            while (wait := start + due - time.monotonic()) > 0:
                time.sleep(wait)
            self._key += 1
            one.sent_s = time.monotonic()
            self._requests[self._key] = one
            with self._free:
                self._open.add(self._key)
            sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
            self._client.submit(Submit(key=self._key, prompt=prompt, sampling=sampling, arrival_s=one.sent_s))
        with self._free:
            done = self._free.wait_for(lambda: not self._open or bool(self._down), limit_s)
        if self._down or not done:
            raise SystemExit(self._down or f"{len(self._open)} requests had not ended after {limit_s:g} s")
        return start, heard

    def batch(self, prompts: Prompts, size: int, prompt_tokens: int, output_tokens: int, limit_s: float) -> list[Heard]:
        """`size` requests at once."""
        plan = [(0.0, prompts.tokens(prompt_tokens, at), output_tokens) for at in range(size)]
        return self.run(plan, limit_s)[1]
