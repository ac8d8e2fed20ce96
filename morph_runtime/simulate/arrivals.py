"""The requests of a trace, as arrays, and the file that hands them over from whoever reads and cuts traces."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from morph_runtime.errors import ConfigError

FIELDS = ("arrival_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Arrivals:
    """N requests in order of arrival.

    Attributes:
        arrival_s: float64 [N], seconds from the start, not falling.
        prompt_tokens: int64 [N], at least 1.
        output_tokens: int64 [N], at least 1.
        source: what a report calls it.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    source: str = ""

    def __post_init__(self) -> None:
        """Raises ConfigError if the arrays do not hold what they should."""
        count = len(self.arrival_s)
        if not count or len(self.prompt_tokens) != count or len(self.output_tokens) != count:
            raise ConfigError(
                f"A trace must have at least one request, and as many of {', '.join(FIELDS)}, but has "
                f"{count}, {len(self.prompt_tokens)} and {len(self.output_tokens)}."
            )
        if not np.isfinite(self.arrival_s).all() or self.arrival_s[0] < 0 or (np.diff(self.arrival_s) < 0).any():
            raise ConfigError("The arrival times of a trace must be 0 or more and sorted.")
        if min(self.prompt_tokens.min(), self.output_tokens.min()) < 1:
            raise ConfigError("Each request of a trace must have at least one prompt token and one output token.")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def end_s(self) -> float:
        """When the last request comes."""
        return float(self.arrival_s[-1])

    def to_json(self) -> dict[str, object]:
        """Plain values; `read_arrivals` takes them."""
        return {
            "source": self.source,
            "arrival_s": self.arrival_s.tolist(),
            "prompt_tokens": self.prompt_tokens.tolist(),
            "output_tokens": self.output_tokens.tolist(),
        }


def read_arrivals(path: Path) -> Arrivals:
    """The requests of a JSON file with the lists `arrival_s`, `prompt_tokens` and `output_tokens`.

    Raises:
        ConfigError: the file cannot be read or used; one sentence for the user.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        times = np.asarray(values["arrival_s"], dtype=np.float64)
        prompts, outputs = (np.asarray(values[name], dtype=np.int64) for name in FIELDS[1:])
    except OSError as error:
        raise ConfigError(f"The trace {path} cannot be read: {error.strerror or error}.") from None
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"The trace {path} must be a JSON object with the lists of numbers {', '.join(FIELDS)}."
        ) from None
    return Arrivals(times, prompts, outputs, str(values.get("source", path.name)))


def steady(rate_per_s: float, seconds: float, prompt: int, output: int, seed: int | None = None) -> Arrivals:
    """Equal requests at one rate: evenly spaced, or as a Poisson process with a seed."""
    count = max(1, round(rate_per_s * seconds))
    if seed is None:
        times = np.arange(count) / rate_per_s
    else:
        times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate_per_s, count))
    ones = np.ones(count, dtype=np.int64)
    return Arrivals(times, prompt * ones, output * ones, f"{rate_per_s:g} requests/s for {seconds:g} s")
