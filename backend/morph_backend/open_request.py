"""A request between its admission and its FINAL: what came in, what the engine has sent, what is out."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from morph_backend.channel import ResponseChannel
from morph_backend.inputs import GenerateRequest
from morph_runtime.engine.messages import TokenLogprobs
from morph_runtime.text.assembler import OutputAssembler


@dataclass(frozen=True)
class Tokens:
    """New tokens from the engine, with the level of each; with log probabilities if they were asked for."""

    tokens: list[int]
    levels: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """The engine's last word on a request: a reason of `Finished`, or `down` (the engine is gone)."""

    reason: str
    detail: str = ""


@dataclass
class OpenRequest:
    """The state of one request.

    `inbox` is filled by the engine's reader thread and emptied by the request's one sender thread;
    everything from `tokens` on belongs to that sender thread. Prompt and tokens are kept to the end.
    """

    key: int
    given: GenerateRequest
    prompt: list[int]
    channel: ResponseChannel
    assembler: OutputAssembler
    arrival_s: float
    """When `execute()` got it, monotonic seconds."""
    inbox: deque[Tokens | End] = field(default_factory=deque)
    submitted: bool = False
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache held; set by the reader thread ahead of the first token."""
    last_token_s: float = 0.0
    """When the engine's last token came, monotonic seconds; 0 before the first. Reader thread only."""
    tokens: list[int] = field(default_factory=list)
    rung_tokens: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Tokens so far by rung (full, w8, w4), weighted by layer."""
    unsent_text: list[str] = field(default_factory=list)
    unsent_levels: list[int] = field(default_factory=list)
    unsent_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    """Sum over the tokens so far of the chosen token's log probability."""
    closing: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False
    """Whether the request has been counted and forgotten; guarded by `closing`."""

    def take(self) -> list[Tokens | End]:
        """All that has come from the engine since the last call."""
        taken: list[Tokens | End] = []
        while self.inbox:
            taken.append(self.inbox.popleft())
        return taken

    def close(self) -> bool:
        """Mark as closed; True for the first caller alone."""
        with self.closing:
            first, self.closed = not self.closed, True
            return first
