"""A replay before it runs: which requests of which file, how they are scaled, and where their prompts come from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from morph_client.agreement import fingerprint
from morph_client.errors import BadInput
from morph_client.loadgen import LoadOptions, Planned, plan_requests
from morph_client.prompts import PromptMaker, check_shared, words_of
from morph_client.stats import Targets
from morph_client.trace_store import find_trace
from morph_client.traces import Trace, clip, cut_window, fix_lengths, keep_every, read_trace, speed_up, thin

# So that no two seeds of a replay share the draws of any request.
_DRAWS_PER_SEED, _MOST_REPEATS = 1 << 20, 1 << 10


@dataclass(frozen=True)
class Cuts:
    """What is replayed of a trace, and how it is scaled. Times in seconds."""

    offset_s: float = 0.0
    window_s: float | None = None
    keep_every: int = 1
    thin: float = 1.0
    seed: int = 0
    speed: float = 1.0
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    fixed_prompt: int | None = None
    fixed_output: int | None = None

    def apply(self, trace: Trace) -> Trace:
        """Window, then thinning, then speed, then lengths. Raises :class:`BadInput`."""
        trace = keep_every(cut_window(trace, self.offset_s, self.window_s), self.keep_every)
        trace = speed_up(thin(trace, self.thin, self.seed), self.speed)
        return fix_lengths(
            clip(trace, self.max_prompt_tokens, self.max_output_tokens), self.fixed_prompt, self.fixed_output
        )


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from."""

    text: Path | None = None
    tokens_per_word: float | None = None
    shared_prefix: int = 0
    prefixes: int = 1


@dataclass(frozen=True)
class ReplayPlan:
    """``trace`` is cut already."""

    trace: Trace
    cuts: Cuts
    source: PromptSource
    words: list[str] = field(repr=False)
    targets: Targets
    deadline_s: float
    connections: int
    temperature: float = 0.0
    keep_text: bool = False
    repeat: int = 0
    """Repeats have the same prompts and, above temperature 0, draws of their own."""

    @property
    def load_options(self) -> LoadOptions:
        """What all of its requests have in common."""
        seed = (self.cuts.seed * _MOST_REPEATS + self.repeat) * _DRAWS_PER_SEED
        return LoadOptions(self.temperature, seed, None, self.deadline_s, self.keep_text)

    def at_speed(self, factor: float) -> ReplayPlan:
        """The same plan, faster by this factor."""
        return replace(
            self, trace=speed_up(self.trace, factor), cuts=replace(self.cuts, speed=self.cuts.speed * factor)
        )

    def requests(self, tokens_per_word: float) -> list[Planned]:
        """The requests with their prompts."""
        source = self.source
        maker = PromptMaker(self.words, tokens_per_word, self.cuts.seed, source.shared_prefix, source.prefixes)
        return plan_requests(self.trace.requests, maker)

    def fingerprint(self, requests: list[Planned]) -> str:
        """Tells runs of the same requests."""
        return fingerprint(requests, self.temperature, self.load_options.seed)

    def to_json(self) -> dict[str, Any]:
        """What a reader needs to repeat the replay."""
        text = self.source.text
        return {
            "trace": self.trace.source,
            "format": self.trace.format,
            "cuts": asdict(self.cuts),
            "prompts": {**asdict(self.source), "text": None if text is None else text.name},
            "targets": asdict(self.targets),
            "temperature": self.temperature,
            "deadline_s": self.deadline_s,
            "described": describe(self),
        }


def make_plan(
    trace: str,
    cuts: Cuts,
    source: PromptSource,
    targets: Targets,
    *,
    skip_empty: bool,
    deadline_s: float,
    connections: int,
    temperature: float,
    keep_text: bool,
) -> ReplayPlan:
    """Reads trace and text. Raises :class:`BadInput` with one sentence for whatever cannot be used."""
    if not temperature >= 0:
        raise BadInput(f"the temperature must be 0 (greedy) or more, not {temperature:g}")
    if cuts.seed < 0:
        raise BadInput(f"the seed must be 0 or more, not {cuts.seed}")
    check_shared(source.shared_prefix, source.prefixes)
    cut = cuts.apply(read_trace(find_trace(trace), skip_zero_tokens=skip_empty))
    return ReplayPlan(
        cut, cuts, source, words_of(source.text), targets, deadline_s, connections, temperature, keep_text
    )


def describe(plan: ReplayPlan) -> str:
    """File, cuts and size in two sentences."""
    cuts, source, requests = plan.cuts, plan.source, plan.trace.requests
    parts = [f"{plan.trace.source} ({plan.trace.format} format)", f"offset {cuts.offset_s:g} s"]
    told = {
        f"window {cuts.window_s:g} s" if cuts.window_s is not None else "": cuts.window_s is not None,
        f"every {_ordinal(cuts.keep_every)} request": cuts.keep_every != 1,
        f"thinned to one in {cuts.thin:g} with seed {cuts.seed}": cuts.thin != 1,
        f"time-compressed × {cuts.speed:g}": cuts.speed > 1,
        f"time-stretched × {1 / cuts.speed:g}": cuts.speed < 1,
        f"prompts cut at {cuts.max_prompt_tokens} tokens": cuts.max_prompt_tokens is not None,
        f"outputs cut at {cuts.max_output_tokens} tokens": cuts.max_output_tokens is not None,
        f"every prompt {cuts.fixed_prompt} tokens": cuts.fixed_prompt is not None,
        f"every output {cuts.fixed_output} tokens": cuts.fixed_output is not None,
        f"prompts begin with one of {source.prefixes} prefixes of {source.shared_prefix} tokens": source.shared_prefix,
        f"prompts from {source.text.name if source.text else ''}": source.text is not None,
        f"drawn at temperature {plan.temperature:g} with seed {cuts.seed}": plan.temperature > 0,
    }
    parts += [part for part, told_of in told.items() if told_of]
    size = (
        f"{len(requests)} requests in {requests[-1].arrival_s:.1f} s, {sum(r.prompt_tokens for r in requests):,} "
        f"prompt and {sum(r.output_tokens for r in requests):,} output tokens"
    )
    return f"{', '.join(parts)}. {size}."


def _ordinal(n: int) -> str:
    return {1: "", 2: "second", 3: "third"}.get(n, f"{n}th")
