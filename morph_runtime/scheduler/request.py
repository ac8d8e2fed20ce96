"""One request as the scheduler sees it."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field

from morph_runtime.engine.messages import SamplingParams, TokenLogprobs
from morph_runtime.scheduler.prefix import Cursor


class RequestState(enum.Enum):
    """Where a request stands; a preempted one is WAITING again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """Prompt, output so far, and the KV blocks that hold them.

    Attributes:
        key: unique id.
        tokens: prompt followed by output. The newest may be unknown as yet, while the step that samples it runs:
            it is negative then, -1 - its row among those that the step samples.
        prompt_len: tokens of the prompt.
        sampling: validated parameters.
        priority: 0 is the highest.
        arrival_s: monotonic seconds.
        computed: leading tokens whose keys and values are in the KV cache once the steps in flight are over.
        blocks: block ids (32 bits each), in token order; `len(blocks) * block_tokens >= computed`.
        levels: the level at which each output token was computed.
        shared: how many of `blocks` others held already when it was admitted.
        cached_tokens: tokens that came from the prefix cache when the request was first scheduled.
        cursor: its place in the prefix cache while it runs.
        order: sort key; more urgent requests compare smaller.
        preemptions: how often the request lost its blocks.
        started: whether it has been scheduled at least once.
        flights: steps in flight that work on it; its blocks are not freed before they are over.
        limit: tokens at which it ends, whatever they are; set by the scheduler.
        scored: leading positions of its prompt whose logits were scored, or will be by the step in flight.
        prompt_scores: what came of that, as far as it is not sent yet.
        slo: its service class, by index; for the controller.
        expected_output: tokens of output that were expected of it when it came; 0: nothing was known.
    """

    key: int
    tokens: list[int]
    prompt_len: int
    sampling: SamplingParams
    priority: int = 0
    arrival_s: float = 0.0
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    levels: list[int] = field(default_factory=list)
    shared: int = 0
    cached_tokens: int = 0
    cursor: Cursor | None = None
    preemptions: int = 0
    started: bool = False
    started_s: float = 0.0
    flights: int = 0
    limit: int = 0
    scored: int = 0
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)
    slo: int = 0
    expected_output: float = 0.0
    state: RequestState = RequestState.WAITING
    order: tuple[int, float, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = (self.priority, self.arrival_s, self.key)

    @property
    def output_len(self) -> int:
        """Tokens generated so far, an unknown one included."""
        return len(self.tokens) - self.prompt_len

    @property
    def is_unscored(self) -> bool:
        """Log probabilities of its prompt are asked for and not all computed."""
        return self.sampling.prompt_logprobs is not None and self.scored < self.prompt_len - 1

    @property
    def is_decoding(self) -> bool:
        """All tokens but the newest are in the KV cache, and at least one was generated."""
        return self.computed == len(self.tokens) - 1 and self.output_len > 0
