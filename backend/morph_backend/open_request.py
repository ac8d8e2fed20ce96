"""A request between its admission and its FINAL: what came in, what the engine has sent, what is out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from morph_backend.channel import ResponseChannel
from morph_backend.inputs import GenerateRequest
from morph_runtime.engine.messages import TokenLogprobs
from morph_runtime.text.assembler import OutputAssembler


class Tokens(msgspec.Struct, frozen=True, gc=False):  # one for each token: made faster than a dataclass
    """New tokens of one output from the engine, with the level of each; with what else was asked for."""

    tokens: list[int]
    levels: list[int]
    logprobs: list[TokenLogprobs] = []
    output: int = 0
    history: list[tuple[int, int, int]] = []


@dataclass(frozen=True)
class End:
    """The engine's last word on an output: a reason of `Finished`, or `down` (the engine is gone)."""

    reason: str
    detail: str = ""
    output: int = 0


@dataclass
class Output:
    """One of a request's `n` outputs; to the engine it is a request of its own.

    All but `key`, `last_token_s`, `arrived` and `ended` belongs to the request's one sender thread. Tokens are kept to
    the end.
    """

    key: int
    assembler: OutputAssembler
    last_token_s: float = 0.0
    """When the engine's last token came, monotonic seconds; 0 before the first. Reader thread only."""
    arrived: int = 0
    """Tokens that have come from the engine. Reader thread only."""
    ended: bool = False
    """Whether the engine has nothing more to do for it."""
    finish_reason: str | None = None
    """None while more tokens may come."""
    tokens: list[int] = field(default_factory=list)
    rung_tokens: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Tokens so far by rung (full, w8, w4), weighted by layer."""
    unsent_text: list[str] = field(default_factory=list)
    unsent_levels: list[int] = field(default_factory=list)
    unsent_logprobs: list[TokenLogprobs] = field(default_factory=list)
    unsent_history: list[tuple[int, int, int]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    """Sum over the tokens so far of the chosen token's log probability."""


@dataclass
class OpenRequest:
    """The state of one request. `inbox` is filled by the engine's reader thread and emptied by the sender thread."""

    given: GenerateRequest
    prompt: list[int]
    channel: ResponseChannel
    outputs: list[Output]
    """At least one; their keys follow each other."""
    arrival_s: float
    """When `execute()` got it, monotonic seconds."""
    inbox: deque[Tokens | End] = field(default_factory=deque)
    submitted: bool = False
    """Whether the engine has been told of all of its outputs."""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache held; set by the reader thread ahead of the first token."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of all tokens of the prompt but the first, if asked for; set by the reader thread ahead of the first token."""
    recomputed_at: list[int] = field(default_factory=list)
    """For each end of an engine that it has outlived: how many tokens of its outputs had come."""
    begun: bool = False
    """Whether a response has gone out."""
    prompt_told: bool = False
    """Whether `prompt_logprobs` have been sent."""
    awaited: bool = False
    """Whether the sender thread has been told of news and has not looked since. See `SenderPool`."""
    closing: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False
    """Whether the request has been counted and forgotten; guarded by `closing`."""

    @property
    def key(self) -> int:
        """The key of its first output."""
        return self.outputs[0].key

    def take(self) -> list[Tokens | End]:
        """All that has come from the engine since the last call; an output's tokens of several steps are one event."""
        runs: list[list[Tokens]] = []
        taken: list[Tokens | End] = []
        while self.inbox:
            event = self.inbox.popleft()
            if isinstance(event, End):
                taken += [*map(joined, runs), event]
                runs = []
            elif runs and runs[-1][0].output == event.output:
                runs[-1].append(event)
            else:
                runs.append([event])
        return [*taken, *map(joined, runs)]

    def close(self) -> bool:
        """Mark as closed; True for the first caller alone."""
        with self.closing:
            first, self.closed = not self.closed, True
            return first


def joined(run: Sequence[Tokens]) -> Tokens:
    """Tokens of one output that follow each other, as one event."""
    if len(run) == 1:
        return run[0]
    return Tokens(
        [token for each in run for token in each.tokens],
        [level for each in run for level in each.levels],
        [scores for each in run for scores in each.logprobs],
        run[0].output,
        [part for each in run for part in each.history],
    )


class OpenRequests:
    """The requests without a FINAL, by the keys of their outputs. Safe to use from several threads."""

    def __init__(self, first_key: int = 1) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[int, tuple[OpenRequest, int]] = {}
        self._next_key = first_key

    def __len__(self) -> int:
        """Requests, however many outputs they have."""
        return len(self.all())

    def new_keys(self, count: int) -> range:
        """Keys that no other output has had."""
        with self._lock:
            first, self._next_key = self._next_key, self._next_key + count
            return range(first, self._next_key)

    def add(self, request: OpenRequest) -> None:
        """Keep a request."""
        with self._lock:
            self._by_key.update({output.key: (request, at) for at, output in enumerate(request.outputs)})

    def remove(self, request: OpenRequest) -> None:
        """Forget a request, if it is there."""
        with self._lock:
            for output in request.outputs:
                self._by_key.pop(output.key, None)

    def find(self, key: int) -> tuple[OpenRequest, int] | None:
        """The request of an output and the output's place in it; None if its FINAL is out."""
        return self._by_key.get(key)

    def all(self) -> list[OpenRequest]:
        """Each request once, oldest first."""
        with self._lock:
            return [request for request, at in self._by_key.values() if at == 0]
