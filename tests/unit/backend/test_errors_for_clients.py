"""An error on a stream is words alone: the client must be able to tell what the model says apart."""

from __future__ import annotations

import pytest

from morph_backend.responder import UNHEALTHY
from morph_backend.service import SHUTTING_DOWN
from morph_client import errors
from morph_runtime.engine.kept import POISON


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (f"{UNHEALTHY}: The engine process ended unexpectedly.", errors.ServerUnavailable),
        (SHUTTING_DOWN, errors.ServerUnavailable),
        (POISON, errors.ServerError),
        ("The engine could not finish it.", errors.ServerError),
        ("The request could not be handled: division by zero", errors.ServerError),
        ("The request could not be sent to the engine: cancelled.", errors.ServerError),
        ("The response could not be sent: not ready", errors.ServerError),
        ("The request took longer than max_request_seconds, 600 s.", errors.DeadlineExceeded),
        ("slo_class: must be one of a, b, but is 'unavailable'.", errors.InvalidRequest),
        ("max_tokens: 9 exceed the context of 8 tokens.", errors.InvalidRequest),
    ],
)
def test_the_servers_own_sentences_are_told_apart(words: str, kind: type) -> None:
    assert type(errors.from_message(words)) is kind
