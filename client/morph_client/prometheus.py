"""Prometheus' text format: a small parser, and quantiles from histogram buckets."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass

from morph_client.errors import BadInput, ServerError, ServerUnavailable

_LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*$")
_LABEL = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True)
class Sample:
    """One line of a metrics page."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class Histogram:
    """A histogram at one moment: ``counts[i]`` observations were at most ``bounds[i]``; the last bound is infinite."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float
    """Sum of the observations."""

    @property
    def count(self) -> float:
        """Number of observations."""
        return self.counts[-1] if self.counts else 0.0

    def since(self, earlier: Histogram | None) -> Histogram:
        """What was observed after ``earlier``. A server that restarted in between counts from its start."""
        if earlier is None or earlier.bounds != self.bounds or earlier.count > self.count:
            return self
        counts = tuple(now - before for now, before in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.bounds, counts, self.total - earlier.total)

    def quantile(self, q: float) -> float | None:
        """An estimate, linear within a bucket as in PromQL; ``None`` without observations.

        A quantile in the last, unbounded bucket gives the greatest finite bound: "at least that".
        """
        if not self.count:
            return None
        rank = q * self.count
        i = next(i for i, count in enumerate(self.counts) if count >= rank)
        if i == len(self.bounds) - 1:
            return self.bounds[-2] if len(self.bounds) > 1 else None
        low, below = (self.bounds[i - 1], self.counts[i - 1]) if i else (0.0, 0.0)
        inside = self.counts[i] - below
        return low + (self.bounds[i] - low) * ((rank - below) / inside if inside else 1.0)


class Metrics:
    """One scrape. Metrics that are absent give ``None``, so that a caller can tell "0" from "not there"."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._by_name: dict[str, list[Sample]] = {}
        for sample in samples:
            self._by_name.setdefault(sample.name, []).append(sample)

    def samples(self, name: str, **labels: str) -> list[Sample]:
        """The samples of this name that carry these labels."""
        return [s for s in self._by_name.get(name, ()) if all(s.labels.get(k) == v for k, v in labels.items())]

    def get(self, name: str, **labels: str) -> float | None:
        """The sum of the matching samples, or ``None`` if there are none."""
        found = self.samples(name, **labels)
        return sum(s.value for s in found) if found else None

    def by_label(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The matching samples summed per value of ``label``, in the page's order."""
        sums: dict[str, float] = {}
        for sample in self.samples(name, **labels):
            key = sample.labels.get(label, "")
            sums[key] = sums.get(key, 0.0) + sample.value
        return sums

    def histogram(self, name: str, **labels: str) -> Histogram | None:
        """The histogram of this name, its matching series added up, or ``None``."""
        by_bound = self.by_label(f"{name}_bucket", "le", **labels)
        if not by_bound:
            return None
        pairs = sorted((float(bound), count) for bound, count in by_bound.items())
        bounds, counts = zip(*pairs, strict=True)
        return Histogram(bounds, counts, self.get(f"{name}_sum", **labels) or 0.0)


def parse(text: str, prefixes: tuple[str, ...] = ("",)) -> Metrics:
    """Parses a page, keeping the names that begin with one of ``prefixes``.

    Raises :class:`ServerError` for a line that is not in the format, naming its number.
    """
    samples = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#") and line.startswith(prefixes):
            samples.append(_sample(line, number))
    return Metrics(samples)


def scrape(url: str, timeout_s: float = 5.0, prefixes: tuple[str, ...] = ("",)) -> Metrics:
    """Fetches and parses a metrics page.

    Raises :class:`ServerUnavailable` if it does not answer, :class:`ServerError` if it is no metrics page and
    :class:`BadInput` if ``url`` is none.
    """
    if not url.startswith(("http://", "https://")):
        raise BadInput(f"'{url}' is not the address of a metrics page: write http://host:port/metrics")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            text = answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        raise ServerError(f"the metrics page {url} answers with status {error.code}") from None
    except (ValueError, http.client.InvalidURL):
        raise BadInput(f"'{url}' is not the address of a metrics page: write http://host:port/metrics") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(error, http.client.BadStatusLine):  # it holds what came, such as the bytes of gRPC
            reason = "what answers there does not speak HTTP/1"
        raise ServerUnavailable(
            f"no metrics page answers at {url} ({reason}): is the server running, and is that its metrics port?"
        ) from None
    return parse(text, prefixes)


def _sample(line: str, number: int) -> Sample:
    found = _LINE.match(line)
    if found is not None:
        name, labels, value = found.groups()
        try:
            return Sample(name, _labels(labels or ""), float(value))
        except ValueError:
            found = None
    raise ServerError(f"line {number} of the metrics page is not in Prometheus' text format")


def _labels(text: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    at = 0
    while at < len(text):
        found = _LABEL.match(text, at)
        if found is None:
            raise ValueError(text)
        labels[found[1]] = _ESCAPE.sub(_unescape, found[2])
        at = found.end()
    return labels


def _unescape(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]
