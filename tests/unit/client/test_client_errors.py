from __future__ import annotations

import pytest

from morph_client import errors
from morph_client.address import grpc_target, metrics_url_for


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("INVALID_ARGUMENT", "top_p must be in (0, 1]", errors.InvalidRequest),
        ("UNAVAILABLE", "Exceeds maximum queue size", errors.QueueFull),
        ("UNAVAILABLE", "Request timeout expired", errors.QueueTimeout),
        ("UNAVAILABLE", "the engine is gone", errors.ServerUnavailable),
        ("UNAVAILABLE", "Socket closed", errors.ServerUnavailable),
        ("UNAVAILABLE", None, errors.ServerUnavailable),
        ("CANCELLED", "Request was cancelled", errors.Cancelled),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", errors.DeadlineExceeded),
        ("RESOURCE_EXHAUSTED", "Received message larger than max", errors.InvalidRequest),
        ("UNIMPLEMENTED", "", errors.ServerError),
        ("INTERNAL", "boom", errors.ServerError),
    ],
)
def test_a_status_becomes_the_class_a_caller_would_handle(code: str, details: str | None, kind: type) -> None:
    error = errors.from_status(code, details, "localhost:8001")
    assert type(error) is kind
    assert str(error)


def test_a_refused_connection_names_the_address_and_the_remedy() -> None:
    details = "failed to connect to all addresses; last error: ipv4:127.0.0.1:1: Connection refused"
    text = str(errors.from_status("UNAVAILABLE", details, "localhost:1"))
    assert "localhost:1" in text and "morph serve" in text and "ipv4" not in text


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("[request id: 4] Exceeds maximum queue size", errors.QueueFull),
        ("Request timeout expired", errors.QueueTimeout),
        ("Request for unknown model: 'x' is not found", errors.ServerUnavailable),
        ("Request was cancelled", errors.Cancelled),
        ("unexpected shape for input 'stream'", errors.InvalidRequest),
        ("", errors.InvalidRequest),
    ],
)
def test_words_without_a_status_are_told_apart(words: str, kind: type) -> None:
    error = errors.from_message(words)
    assert type(error) is kind
    assert str(error) and not str(error).startswith("[request id")


def test_a_sentence_has_no_line_breaks() -> None:
    assert str(errors.from_message("first\n  second")) == "first second"


@pytest.mark.parametrize(
    ("given", "target"),
    [("host:9", "host:9"), ("host", "host:8001"), ("grpc://host:9/", "host:9"), ("[::1]:9", "[::1]:9")],
)
def test_an_address_may_be_written_in_several_ways(given: str, target: str) -> None:
    assert grpc_target(given) == target


@pytest.mark.parametrize("given", ["http://host:8000", "host:port", "", "a b:1", "host:1/path", "host:99999"])
def test_what_cannot_be_an_address_is_refused(given: str) -> None:
    with pytest.raises(errors.BadInput, match="host:port"):
        grpc_target(given)


def test_the_metrics_page_is_looked_for_on_the_same_host() -> None:
    assert metrics_url_for("gpu7:9001") == "http://gpu7:8002/metrics"
    assert metrics_url_for("[::1]:9001") == "http://[::1]:8002/metrics"
