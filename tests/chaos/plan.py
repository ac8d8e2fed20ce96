"""What will happen in a run, fixed by its seed: which requests come, in which bursts, and what is done to the server.

The times are those of the run's clock; what the scheduler of the machine makes of them is not repeatable.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PROMPTS = (
    "Once upon a time",
    "The sea",
    "In the old house by the river there lived",
    "A long way from the village, the road",
    "“Who is there?” asked",
    "It was a bright cold day, and the clocks",
)
WAYS = ("grpc", "grpc", "grpc", "sse", "sse", "generate", "grpc cancel", "grpc cancel", "sse drop")
FAULTS = (
    "kill engine",
    "kill engine",
    "segfault engine",
    "terminate engine",
    "stop engine",
    "wedge engine",
    "stop stub",
)


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: index into `PROMPTS`.
        sampling: its parameters.
        way: how it is sent; `cancel` and `drop` leave after `leave_after` responses.
    """

    prompt: int
    sampling: dict[str, Any] = field(hash=False)
    way: str
    leave_after: int

    @property
    def reference(self) -> tuple[int, str]:
        """Requests with equal ones have equal texts."""
        return self.prompt, repr(sorted(self.sampling.items()))


@dataclass(frozen=True)
class Fault:
    """Something done to a process at `at_s`; `for_s` is how long it is stopped, or how far the clock is set off."""

    at_s: float
    what: str
    for_s: float = 0.0


def samplings(max_tokens: int) -> list[dict[str, Any]]:
    """The few ways of sampling that have references."""
    greedy: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return [
        greedy,
        {**greedy, "max_tokens": max_tokens // 3},
        {**greedy, "repetition_penalty": 1.2, "frequency_penalty": 0.1},
        {**greedy, "stop": ["zzz", "?"], "min_tokens": 4},
        {"max_tokens": max_tokens, "temperature": 1.1, "top_p": 0.95, "seed": 42, "ignore_eos": True},
    ]


def asks(seed: int, max_tokens: int) -> Iterator[Ask]:
    """The requests, without end."""
    dice = random.Random(f"asks {seed}")
    choices = samplings(max_tokens)
    while True:
        yield Ask(dice.randrange(len(PROMPTS)), dice.choice(choices), dice.choice(WAYS), dice.randint(0, 25))


def bursts(seed: int, seconds: float, most: int) -> list[tuple[float, int]]:
    """From when on how many clients are busy: calm and bursts in turn."""
    dice, at, phases = random.Random(f"bursts {seed}"), 0.0, []
    while at < seconds:
        phases.append((at, dice.choice((1, 2, most // 2, most, most))))
        at += dice.uniform(2.0, 6.0)
    return phases


def faults(seed: int, seconds: float, every_s: float, kinds: tuple[str, ...], silence_s: float) -> list[Fault]:
    """What is done to the server, about every `every_s` seconds; a pause above `silence_s` is a wedged engine."""
    dice, at, planned = random.Random(f"faults {seed}"), every_s, []
    while at < seconds:
        what = dice.choice(kinds)
        for_s = {"stop engine": dice.uniform(0.2, silence_s / 3), "stop stub": dice.uniform(0.2, 1.0)}.get(what, 0.0)
        planned.append(Fault(at, what, for_s))
        at += every_s * dice.uniform(0.8, 1.2) if len(set(kinds)) > 1 else every_s
    return planned


def jumps(seed: int, seconds: float, every_s: float) -> list[Fault]:
    """When the server's wall clock is set, and how many seconds ahead of the true time (see `FalseClock.set`)."""
    dice, at, planned = random.Random(f"clock {seed}"), every_s / 2, []
    while at < seconds:
        planned.append(Fault(at, "set clock", dice.choice((0, 1, 60, 3600, 86_400, 864_000))))
        at += every_s * dice.uniform(0.5, 1.5)
    return planned
