"""Who may leave the outer queue: never so many that they cannot run, never so few that a step goes half empty."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from morph_runtime.credits import CreditLimits, EngineNews, may_enter

LIMITS = st.builds(CreditLimits, line=st.integers(1, 4), step_tokens=st.integers(0, 200), seats=st.integers(0, 12))
NEWS = st.builds(EngineNews, running=st.integers(0, 12), short_of_blocks=st.booleans())
PROMPTS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 120)), max_size=30)
"""Outputs and prompt tokens of each request."""


def admit(limits: CreditLimits, news: EngineNews, prompts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Outputs and prompt tokens of those that get in one after the other, before any step."""
    held: list[tuple[int, int]] = []
    for outputs, prompt in prompts:
        count, tokens = sum(n for n, _ in held), sum(t for _, t in held)
        if not may_enter(limits, news, count, tokens, outputs, outputs * prompt):
            break
        held.append((outputs, outputs * prompt))
    return held


@settings(max_examples=200, deadline=None)
@given(limits=LIMITS, news=NEWS, prompts=PROMPTS)
def test_beyond_the_line_there_are_never_more_than_one_step_and_the_seats_hold(
    limits: CreditLimits, news: EngineNews, prompts: list[tuple[int, int]]
) -> None:
    held = admit(limits, news, prompts)
    count = sum(n for n, _ in held)
    if len(held) > 1 and count > limits.line:
        assert not news.short_of_blocks
        assert sum(tokens for _, tokens in held) <= limits.step_tokens
        assert news.running + count <= limits.seats


@settings(max_examples=200, deadline=None)
@given(limits=LIMITS, news=NEWS, prompts=PROMPTS)
def test_the_line_is_always_there_and_somebody_always_gets_in(
    limits: CreditLimits, news: EngineNews, prompts: list[tuple[int, int]]
) -> None:
    held = admit(limits, news, prompts)
    assert len(held) >= min(1, len(prompts))
    singles = admit(limits, news, [(1, prompt) for _, prompt in prompts])
    assert len(singles) >= min(limits.line, len(prompts))


@settings(max_examples=200, deadline=None)
@given(limits=LIMITS, running=st.integers(0, 12), prompts=PROMPTS)
def test_an_engine_with_room_gets_prompts_until_the_next_would_not_fit_into_its_step(
    limits: CreditLimits, running: int, prompts: list[tuple[int, int]]
) -> None:
    news = EngineNews(running)
    held = admit(limits, news, prompts)
    if len(held) < len(prompts):
        outputs, prompt = prompts[len(held)]
        count = sum(n for n, _ in held) + outputs
        tokens = sum(t for _, t in held) + outputs * prompt
        assert count + running > limits.seats or tokens > limits.step_tokens


@settings(max_examples=200, deadline=None)
@given(limits=LIMITS, news=NEWS, held=st.integers(0, 12), tokens=st.integers(0, 200), more=st.integers(0, 5))
def test_who_may_enter_may_enter_an_engine_that_has_more_room(
    limits: CreditLimits, news: EngineNews, held: int, tokens: int, more: int
) -> None:
    if may_enter(limits, news, held, tokens, 1, 7):
        assert may_enter(limits, EngineNews(max(0, news.running - more)), max(0, held - more), tokens, 1, 7)
        roomier = replace(limits, line=limits.line + more, step_tokens=limits.step_tokens + more)
        assert may_enter(roomier, news, held, tokens, 1, 7)
