"""Numbers out of a load run: percentiles, TTFT, TPOT, throughput, precision. All times in seconds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from morph_client.errors import BadInput
from morph_client.types import RungShare


@dataclass(frozen=True)
class RequestRecord:
    """What one request of a load run met. Times count from the start of the run."""

    index: int
    """The request's place in the schedule, from 0."""
    due_s: float
    """When it was due."""
    sent_s: float
    """When it was sent; later than due if this client fell behind."""
    prompt_tokens: int
    """As the server counted them; as planned if it never said."""
    output_tokens: int
    first_s: float | None
    """When the first token came; ``None`` if none did."""
    last_s: float | None
    """When the last token came."""
    level0_tokens: int
    """Output tokens computed at level 0, all layers at full precision."""
    max_level: int
    rung_share: RungShare | None
    error: str | None
    """The error's sentence, or ``None`` if the answer is complete."""
    gaps_s: tuple[float, ...] = ()
    """Pauses between responses that carried tokens: what a reader of the stream sees."""
    text: str | None = None
    """The output; ``None`` unless it was kept."""
    slo_class: str | None = None
    """The service class that the trace gives the request."""

    @property
    def ttft_s(self) -> float | None:
        """From the moment the request was *due*, so that a slow client cannot flatter the server."""
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; ``None`` for fewer than two tokens."""
        if self.first_s is None or self.last_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """From the moment the request was due to its last token."""
        return None if self.last_s is None else self.last_s - self.due_s


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of some times; ``None`` where there was nothing to measure."""

    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True)
class Summary:
    """One load run in figures."""

    requests: int
    errors: int
    error_kinds: dict[str, int]
    """How often each error sentence came."""
    ttft_s: Spread
    tpot_s: Spread
    e2e_s: Spread
    itl_s: Spread
    """Pauses between responses, all requests together."""
    output_tokens: int
    span_s: float
    """From the first request's due time to the last token."""
    output_tokens_per_s: float
    requests_per_s: float
    """Complete answers per second of the span."""
    slo_violations: int | None
    """Requests that failed or missed a target; ``None`` without targets."""
    goodput_per_s: float | None
    """Complete answers within all targets, per second of the span; ``None`` without targets."""
    level0_share: float | None
    """Share of output tokens computed with every layer at full precision."""
    rung_share: RungShare | None
    """Shares of all output tokens by precision, weighted by layer."""
    max_level: int
    max_lateness_s: float
    """The furthest this client fell behind its own schedule."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between neighbours, as NumPy's default. Raises ``ValueError`` for no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> Spread:
    """Mean, p50, p95 and p99."""
    if not values:
        return Spread(None, None, None, None)
    return Spread(math.fsum(values) / len(values), *(percentile(values, p) for p in (50, 95, 99)))


@dataclass(frozen=True)
class Targets:
    """Service-level objectives in seconds; ``None`` is no objective."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("TTFT", self.ttft_s), ("TPOT", self.tpot_s)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BadInput(f"the {name} target must be a positive number of seconds, not {value:g}")

    def missed(self, record: RequestRecord) -> bool:
        """Whether the request failed or was slower than a target."""
        late = (record.ttft_s or 0.0) > (self.ttft_s or math.inf)
        return record.error is not None or late or (record.tpot_s or 0.0) > (self.tpot_s or math.inf)


NO_TARGETS = Targets()


def summarise(records: Sequence[RequestRecord], targets: Targets = NO_TARGETS) -> Summary:
    """The figures of a run. Latencies are those of the complete answers; a failed request counts as an error."""
    good = [r for r in records if r.error is None]
    ends = [r.last_s for r in records if r.last_s is not None]
    span = max(ends) - min(r.due_s for r in records) if ends else 0.0
    tokens = sum(r.output_tokens for r in records)
    late = None if targets == NO_TARGETS else sum(map(targets.missed, records))
    return Summary(
        requests=len(records),
        errors=len(records) - len(good),
        error_kinds=dict(Counter(r.error for r in records if r.error is not None).most_common()),
        ttft_s=spread([r.ttft_s for r in good if r.ttft_s is not None]),
        tpot_s=spread([r.tpot_s for r in good if r.tpot_s is not None]),
        e2e_s=spread([r.e2e_s for r in good if r.e2e_s is not None]),
        itl_s=spread([gap for r in good for gap in r.gaps_s]),
        output_tokens=tokens,
        span_s=span,
        output_tokens_per_s=tokens / span if span > 0 else 0.0,
        requests_per_s=len(good) / span if span > 0 else 0.0,
        slo_violations=late,
        goodput_per_s=None if late is None else (len(records) - late) / span if span > 0 else 0.0,
        level0_share=_level0_share(records),
        rung_share=_mean_share(records),
        max_level=max((r.max_level for r in records), default=0),
        max_lateness_s=max((r.sent_s - r.due_s for r in records), default=0.0),
    )


def _level0_share(records: Sequence[RequestRecord]) -> float | None:
    # A server that does not report levels leaves rung_share out too.
    known = [r for r in records if r.rung_share is not None]
    tokens = sum(r.output_tokens for r in known)
    return sum(r.level0_tokens for r in known) / tokens if tokens else None


def _mean_share(records: Sequence[RequestRecord]) -> RungShare | None:
    weighted = [(r.rung_share, r.output_tokens) for r in records if r.rung_share is not None]
    tokens = sum(n for _, n in weighted)
    if not tokens:
        return None
    return RungShare(
        full=sum(share.full * n for share, n in weighted) / tokens,
        w8=sum(share.w8 * n for share, n in weighted) / tokens,
        w4=sum(share.w4 * n for share, n in weighted) / tokens,
    )
