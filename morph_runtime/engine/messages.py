"""The messages between the serving process and the engine process (MessagePack, length-prefixed, over a socket pair).

One frame carries one message; a message is one of the tagged structs below. Times are seconds of
`time.monotonic()`, which both processes share on one machine. Nothing here imports torch.
"""

from __future__ import annotations

import msgspec


class StructuredOutputs(msgspec.Struct, frozen=True):
    """The form that a request's output must have.

    Attributes:
        kind: `json` (text is a JSON schema), `regex`, `choice` (text is a JSON list of strings) or `grammar`
            (EBNF in GBNF's or Lark's notation).
        text: the definition.
        whitespace: regular expression of the white space between JSON tokens; empty: none is allowed.
    """

    kind: str
    text: str
    whitespace: str = ""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the tokens of one request are chosen; names and defaults are vLLM's.

    Valid by construction only when made by `morph_runtime.text.parameters`; the engine trusts it.
    `stop`, `include_stop_str_in_output`, `skip_special_tokens` and `bad_words` act on text and stay in the
    serving process, which adds `bad_word_ids`: the token sequences that the engine must not complete. So does
    `n`: the serving process makes that many requests of one.
    `score` asks for the log probability of each chosen token even without `logprobs`, `history` for the
    levels at which everything was computed.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    score: bool = False
    history: bool = False
    structured_outputs: StructuredOutputs | None = None
    n: int = 1


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first frame to a new engine process: its `EngineConfig` as JSON."""

    config: str


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A new request. `key` is unique for the life of the serving process; `priority` 0 is the highest.

    `after` is the key of a request with the same prompt that was submitted earlier. With the prefix cache on, this
    one does not start before the prompt of that one is in the cache, so that it is computed once; 0, or a request
    that has ended, holds nothing back.

    `resumed` are the tokens of its output that an engine process before this one has produced: it goes on after them,
    as after a preemption, and they are not sent again.
    """

    key: int
    prompt: list[int]
    sampling: SamplingParams
    priority: int = 0
    arrival_s: float = 0.0
    slo_class: str = ""
    after: int = 0
    resumed: list[int] = []


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """End a request and free its blocks. No answer follows but the acknowledging `Finished(reason="cancelled")`."""

    key: int


class QueueSignal(msgspec.Struct, frozen=True, tag="queue"):
    """What the outer queue (Triton's) shows; sent a few times a second by the serving process.

    Attributes:
        taken_s: when it was read (monotonic seconds); the controller ignores a stale one.
        pending: requests in the outer queue, the one held in `execute()` included.
        queue_time_s: mean time that requests of the last interval spent in the queue; 0 without any.
        arrivals_per_s: request rate of the last interval.
    """

    taken_s: float
    pending: int
    queue_time_s: float = 0.0
    arrivals_per_s: float = 0.0


class SetMode(msgspec.Struct, frozen=True, tag="mode"):
    """Change the controller at run time.

    Attributes:
        mode: `accuracy`, `balanced`, `performance` or `off`; empty: as it is.
        cap: share of the levels that may be used, 0 to 1; None: as it is.
    """

    mode: str = ""
    cap: float | None = None


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Finish what runs, then exit with status 0."""


ToEngine = Start | Submit | Cancel | QueueSignal | SetMode | Drain


class EngineInfo(msgspec.Struct, frozen=True, tag="info"):
    """Sent once, when the engine is ready.

    `kv_dtype` is what the KV cache stores: `bfloat16`, `float32`, `fp8` or `int8`. `pin` is the rung that it serves at
    from start to end; empty: the controller decides.
    """

    model: str
    architecture: str
    device: str
    dtype: str
    num_layers: int
    vocab_size: int
    eos_token_ids: list[int]
    max_model_len: int
    max_num_seqs: int
    block_tokens: int
    kv_dtype: str
    base_blocks: int
    level_max: int
    ladder: list[str]
    budget_bytes: int
    start_s: float
    pin: str = ""
    max_num_batched_tokens: int = 0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, before temperature, penalties and the like (vLLM's `raw_logprobs`).

    Attributes:
        rank: of the chosen token; 1 is the most likely.
        ids: the chosen token, then the most likely ones in order (ranks 1, 2, ...), as many as were asked for.
        values: natural logarithms, one per id; never below `LOGPROB_MIN`.
    """

    rank: int
    ids: list[int]
    values: list[float]


LOGPROB_MIN = -9999.0
"""Stands for minus infinity, which JSON does not have (as in vLLM's OpenAI server)."""


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request, with the level at which each was computed.

    `logprobs` has one entry per token if the request asked for them, else none. `prompt_logprobs` comes with a
    request's first token if it asked: one entry for each token of its prompt but the first. `history` holds what was
    computed since the last delta if the request asked: (first position, end, level) of prompt and output, see
    `engine.histories`.
    """

    key: int
    tokens: list[int]
    levels: list[int]
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    history: list[tuple[int, int, int]] = []


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """A request has ended: `stop`, `length`, `cancelled`, `invalid` or `error` (these two: `detail` is a sentence).

    `invalid` is the client's fault, found only in the engine (a grammar that does not compile).
    """

    key: int
    reason: str
    detail: str = ""
    preemptions: int = 0


class StepOutput(msgspec.Struct, frozen=True, tag="step"):
    """What one engine step produced.

    `started` lists requests that were scheduled for the first time in this step (their credit is
    free again); `tokens` come before `finished` of the same request.
    """

    started: list[int]
    tokens: list[TokenDelta]
    finished: list[Finished]
    waiting: int
    running: int
    started_cached: list[int] = []
    """For each of `started`: tokens of its prompt that the prefix cache held."""
    short_of_blocks: bool = False
    """Requests wait because too few KV blocks are free for the first of them; or the keeper tries suspects."""
    from_engine: bool = True
    """False: the keeper tells of ends that no engine has told, and only `finished` means anything."""


class Considered(msgspec.Struct, frozen=True, array_like=True):
    """What was forecast of one level.

    Attributes:
        score: 0 where the SLOs are met; else the mean share by which they are overrun.
        late: share of the requests whose TTFT would be above its bound.
        ttft_s: the longest TTFT of those that wait or will come.
        tpot_s: mean time between two tokens.
    """

    level: int
    score: float
    late: float
    ttft_s: float
    tpot_s: float


class Decision(msgspec.Struct, frozen=True):
    """One decision of the controller, with its inputs, its reason and what was forecast of the levels that mattered.

    `met` is false if the SLOs are not expected to be met at any level that may be used.
    """

    at_s: float
    action: str
    reason: str
    level_from: int
    level_to: int
    inputs: dict[str, float]
    considered: list[Considered] = []
    met: bool = True


class EngineStats(msgspec.Struct, frozen=True, tag="stats"):
    """A snapshot of the engine, sent a few times a second and at each change of level.

    Counters are totals since the engine started; `prefix_queries` and `prefix_hits` count tokens.
    `layer_bits` has one entry per decoder layer: 16, 8 or 4.
    `signals` says of each input of the controller whether it is there; `estimate_errors` by how much estimates have
    differed of late (lengths: as a share of the truth; `queue_age`: seconds). `computed_tokens` counts tokens whose
    keys and values were computed, of requests that are over; `clean_tokens` those that nothing below full precision
    went into. `gpu_used_share` is what NVML shows of the GPU's memory; -1 without a GPU.
    Bytes are of the page arena. `decisions` holds those made since the last snapshot.
    """

    at_s: float
    level: int
    mode: str
    layer_bits: list[int]
    kv_blocks_capacity: int
    kv_blocks_used: int
    waiting: int
    running: int
    steps: int
    step_seconds: float
    preemptions: int
    shifts_down: int
    shifts_up: int
    shift_down_seconds: float
    shift_up_seconds: float
    blocks_migrated: int
    weights_bytes: int
    kv_bytes: int
    static_bytes: int
    free_bytes: int
    resident_bytes: int
    decisions: list[Decision]
    decision_counts: dict[str, int]
    shifts_by_rung: dict[str, int]
    shifts_refused: int = 0
    kv_blocks_cached: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    cap: float = 1.0
    slo_feasible: bool = True
    signals: dict[str, bool] = {}
    estimate_errors: dict[str, float] = {}
    computed_tokens: int = 0
    clean_tokens: int = 0
    gpu_used_share: float = -1.0


class EngineFailure(msgspec.Struct, frozen=True, tag="failure"):
    """The engine cannot go on (or could not start): one sentence. The process exits after it."""

    message: str
    user_error: bool = False


FromEngine = EngineInfo | StepOutput | EngineStats | EngineFailure
