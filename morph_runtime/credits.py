"""The rule by which requests leave the outer queue: who may be in the engine without having run a step.

A request holds a *credit* for each of its outputs from then until a step has started that output. The rule keeps the
backlog outside, where priorities and timeouts are, and still hands over as many short prompts as one step can take.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CreditLimits:
    """What the engine takes.

    Attributes:
        line: credits that may be out whatever the engine does; at least 1.
        step_tokens: tokens of one step; 0: only `line` counts.
        seats: outputs that may run at the same time.
    """

    line: int
    step_tokens: int = 0
    seats: int = 0


@dataclass(frozen=True)
class EngineNews:
    """What the last step has told.

    Attributes:
        running: outputs that hold KV blocks.
        short_of_blocks: somebody waited in the engine because there were too few free KV blocks.
    """

    running: int = 0
    short_of_blocks: bool = False


def may_enter(limits: CreditLimits, news: EngineNews, held: int, held_tokens: int, outputs: int, tokens: int) -> bool:
    """Whether the next request may leave the outer queue.

    It may if nobody holds a credit, or if its outputs fit into the line. Beyond the line it may if the engine is not
    short of blocks, the prompts of all holders and its own fit into one step, and there are free seats for it.

    Args:
        limits: of the engine.
        news: the engine's last step.
        held: credits that are out.
        held_tokens: prompt tokens of those who hold them, counted for each output.
        outputs: of the request that asks.
        tokens: its prompt tokens, counted for each output.
    """
    if not held or held + outputs <= limits.line:
        return True
    if news.short_of_blocks or news.running + held + outputs > limits.seats:
        return False
    return held_tokens + tokens <= limits.step_tokens
