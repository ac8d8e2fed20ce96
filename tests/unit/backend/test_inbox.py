"""A request's inbox: tokens of several steps are joined, and nothing is lost, doubled or moved past an end."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from morph_backend.open_request import End, OpenRequest, Tokens

OUTPUTS = 3
events = st.lists(
    st.one_of(
        st.builds(
            lambda output, tokens: Tokens(
                tokens, [token % 5 for token in tokens], [], output, [(t, t + 1, 0) for t in tokens]
            ),
            st.integers(0, OUTPUTS - 1),
            st.lists(st.integers(0, 99), min_size=1, max_size=3),
        ),
        st.builds(lambda output: End("length", output=output), st.integers(0, OUTPUTS - 1)),
    ),
    max_size=12,
)


def flat(given_events: list[Tokens | End]) -> list[Any]:
    """Token by token, with all that belongs to each."""
    found: list[Any] = []
    for event in given_events:
        if isinstance(event, End):
            found.append(("end", event.output))
        else:
            found += list(
                zip([event.output] * len(event.tokens), event.tokens, event.levels, event.history, strict=True)
            )
    return found


@given(events)
def test_what_is_taken_is_what_came_in_order(came: list[Tokens | End]) -> None:
    output: Any = SimpleNamespace(key=1)
    request = OpenRequest(SimpleNamespace(), [], SimpleNamespace(), [output], 0.0)  # type: ignore[arg-type]
    request.inbox.extend(came)
    taken = request.take()
    assert flat(taken) == flat(came)
    assert not request.inbox
    for before, after in itertools.pairwise(taken):
        joinable = isinstance(before, Tokens) and isinstance(after, Tokens) and before.output == after.output
        assert not joinable, "tokens of one output that follow each other are one event"
