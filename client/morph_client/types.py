"""The values that go into a request and come out of it. All times are in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from morph_client.errors import InvalidRequest


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. ``None`` leaves the server's default (in brackets).

    A value out of range is refused by the server with :class:`~morph_client.errors.InvalidRequest`,
    which names the field and the limit.
    """

    max_tokens: int | None = None
    """Most tokens to generate (16)."""
    min_tokens: int | None = None
    """Fewest tokens before a stop is heeded (0)."""
    temperature: float | None = None
    """0 is greedy (1.0)."""
    top_p: float | None = None
    """Probability mass to sample from (1.0)."""
    top_k: int | None = None
    """Number of candidates to sample from; 0 is all of them (0)."""
    seed: int | None = None
    """Makes sampling repeatable (none)."""
    n: int | None = None
    """Outputs to generate from the prompt; above 1 only when sampling (1)."""
    stop: str | Sequence[str] | None = None
    """A string or several at which to stop (none)."""
    ignore_eos: bool | None = None
    """Go on past the end-of-sequence token (false)."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop string in the text (false)."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text (true)."""
    min_p: float | None = None
    """Drops tokens less likely than this share of the most likely one (0.0)."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens that have occurred (1.0)."""
    presence_penalty: float | None = None
    """Taken off the logit of each token that the output holds (0.0)."""
    frequency_penalty: float | None = None
    """The same, times its count (0.0)."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids (none)."""
    bad_words: Sequence[str] | None = None
    """Words that may not be completed (none)."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the output (none)."""
    logprobs: int | None = None
    """Log probabilities of this many most likely tokens beside the chosen one, up to 20 (none)."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first (none)."""
    structured_outputs: Mapping[str, object] | None = None
    """The form of the output: one of ``json`` (a schema), ``regex``, ``choice`` (a list), ``grammar`` (none)."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Any other key, passed on as it is."""

    def to_json(self) -> str:
        """The ``sampling_parameters`` tensor.

        Raises :class:`InvalidRequest` for a NaN, an infinity, or a value JSON cannot carry.
        """
        given: dict[str, object] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "extra" and value is not None:
                given[item.name] = value if isinstance(value, (str, int, float, Mapping)) else list(value)
        given.update(self.extra)
        try:
            return json.dumps(given, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"the sampling parameters cannot be sent: {error}") from None


@dataclass(frozen=True)
class RungShare:
    """Shares of a request's output tokens by precision, weighted by layer; they sum to 1."""

    full: float
    w8: float
    w4: float


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log probability."""

    token_id: int
    text: str
    logprob: float
    """Natural logarithm; -9999 stands for an impossible token."""
    rank: int
    """1 is the most likely."""


@dataclass(frozen=True, kw_only=True)
class OutputChunk:
    """What one response says of one output."""

    text: str
    """The text since the last chunk."""
    tokens: int
    """Number of tokens since the last chunk."""
    levels: tuple[int, ...]
    """The level at which each of these tokens was computed; empty if not asked for."""
    rung_share: RungShare | None
    """Shares of all tokens of this output so far; ``None`` if not asked for."""
    finish_reason: str | None
    """``stop`` or ``length`` once the output has ended, else ``None``."""
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    """For each of these tokens, it and then the most likely ones; empty if not asked for."""


@dataclass(frozen=True, kw_only=True)
class Chunk(OutputChunk):
    """One response of a stream: what is new in the first output, and in the others if ``n`` was above 1."""

    num_input_tokens: int | None
    """Length of the prompt in tokens; ``None`` on chunks between the first and the end of an output."""
    arrival_s: float
    """When this chunk arrived, counted from the moment the request was sent."""
    num_cached_tokens: int | None = None
    """Tokens of the prompt that the prefix cache held; ``None`` if not asked for, and where the one above is."""
    prompt_logprobs: tuple[tuple[TokenLogprob, ...] | None, ...] = ()
    """On one chunk, if asked for: each token of the prompt and then the most likely ones; first a ``None``."""
    more: tuple[OutputChunk, ...] = ()
    """The other outputs, with or without news."""

    @property
    def outputs(self) -> tuple[OutputChunk, ...]:
        """All of the outputs, in order."""
        return (self, *self.more)


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One whole output."""

    text: str
    finish_reason: str | None
    num_output_tokens: int
    levels: tuple[int, ...]
    """The level at which each output token was computed."""
    rung_share: RungShare | None
    token_arrivals_s: tuple[float, ...]
    """When each output token arrived, counted from the sending. Tokens of one chunk share a time."""
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    """For each output token, it and then the most likely ones; empty if not asked for."""


@dataclass(frozen=True, kw_only=True)
class Completion(CompletionOutput):
    """A whole answer: the first output, and the others if ``n`` was above 1."""

    num_input_tokens: int
    ttft_s: float
    """From sending the request to its first response."""
    e2e_s: float
    """From sending the request to its last response."""
    num_cached_tokens: int | None = None
    """Tokens of the prompt that the prefix cache held; ``None`` if not asked for."""
    prompt_logprobs: tuple[tuple[TokenLogprob, ...] | None, ...] = ()
    """If asked for: each token of the prompt and then the most likely ones; ``None`` for the first token."""
    more: tuple[CompletionOutput, ...] = ()
    """The other outputs."""

    @property
    def outputs(self) -> tuple[CompletionOutput, ...]:
        """All of the outputs, in order."""
        return (self, *self.more)


class _OutputBuilder:
    """Joins the chunks of one output."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._levels: list[int] = []
        self._logprobs: list[tuple[TokenLogprob, ...]] = []
        self._arrivals: list[float] = []
        self._last: OutputChunk | None = None

    def add(self, chunk: OutputChunk, arrival_s: float) -> None:
        self._text.append(chunk.text)
        self._levels.extend(chunk.levels)
        self._logprobs.extend(chunk.logprobs)
        self._arrivals.extend([arrival_s] * chunk.tokens)
        self._last = chunk

    def build(self) -> CompletionOutput:
        assert self._last is not None
        return CompletionOutput(
            text="".join(self._text),
            finish_reason=self._last.finish_reason,
            num_output_tokens=len(self._arrivals),
            levels=tuple(self._levels),
            rung_share=self._last.rung_share,
            token_arrivals_s=tuple(self._arrivals),
            logprobs=tuple(self._logprobs),
        )


class CompletionBuilder:
    """Joins chunks into a :class:`Completion`."""

    def __init__(self) -> None:
        self._outputs: list[_OutputBuilder] = []
        self._first: Chunk | None = None
        self._last: Chunk | None = None
        self._prompt_logprobs: tuple[tuple[TokenLogprob, ...] | None, ...] = ()

    def add(self, chunk: Chunk) -> None:
        """Takes the next chunk of the stream."""
        while len(self._outputs) < len(chunk.outputs):
            self._outputs.append(_OutputBuilder())
        for builder, output in zip(self._outputs, chunk.outputs, strict=False):
            builder.add(output, chunk.arrival_s)
        self._first = self._first or chunk
        self._prompt_logprobs = self._prompt_logprobs or chunk.prompt_logprobs
        self._last = chunk

    def build(self) -> Completion:
        """The completion so far. Raises :class:`InvalidRequest` if no chunk ever came."""
        begun, last = self._first, self._last
        if begun is None or last is None:
            raise InvalidRequest("the stream held no response")
        first, *more = [builder.build() for builder in self._outputs]
        return Completion(
            **{item.name: getattr(first, item.name) for item in fields(CompletionOutput)},
            num_input_tokens=begun.num_input_tokens or 0,
            ttft_s=begun.arrival_s,
            e2e_s=last.arrival_s,
            num_cached_tokens=begun.num_cached_tokens,
            prompt_logprobs=self._prompt_logprobs,
            more=tuple(more),
        )
