"""What can go wrong, as types: one exception class per thing that a caller would handle differently.

Each exception carries one sentence: the server's own where the server spoke, else one that names the remedy.
"""

from __future__ import annotations

import re


class MorphError(Exception):
    """The base of every error this package raises on purpose. ``str(error)`` is one sentence."""


class InvalidRequest(MorphError):
    """The server refused the request, and sending it again unchanged would fail again."""


class QueueFull(MorphError):
    """The server's queue is at its limit: try again later, or add a replica."""


class QueueTimeout(MorphError):
    """The request waited in the server's queue for longer than its time limit."""


class Cancelled(MorphError):
    """The request was cancelled, by this client or by the server."""


class DeadlineExceeded(MorphError):
    """The request as a whole took longer than the caller's ``deadline_s``, or than the server lets any take."""


class ServerUnavailable(MorphError):
    """No server answers, the connection was lost, or the model is not ready."""


class ServerError(MorphError):
    """The server failed, or its answer does not follow the wire contract."""


class BadInput(MorphError):
    """A file, an option or an environment variable given to a command cannot be used as it is."""


class MissingDependency(MorphError):
    """An optional part of the product is needed and not installed."""


_PREFIX = re.compile(r"^\s*\[request id: [^\]]*\]\s*")
_FIELD = re.compile(r"[a-z][a-z_0-9.]*: ")
_KINDS: tuple[tuple[re.Pattern[str], type[MorphError]], ...] = tuple(
    (re.compile(words, re.IGNORECASE), kind)
    for words, kind in (
        (r"could not be (handled|sent)|engine could not finish|has ended the engine process", ServerError),
        (r"took longer than max_request_seconds", DeadlineExceeded),
        (r"exceeds maximum queue size|queue is full|queue.*\bfull\b", QueueFull),
        (r"request timeout expired|timed out .*queue|queue.*timed? ?out", QueueTimeout),
        (r"\bcancell?ed\b", Cancelled),
        (
            "unknown model|not ready|unavailable|unhealthy|not healthy|no available versions|shutting down|not loaded",
            ServerUnavailable,
        ),
    )
)
"""The first that matches counts."""
_NOT_CONNECTED = re.compile(
    r"failed to connect|connection refused|name resol|errors resolving|lookup failed|dns resol|no route|unreachable",
    re.IGNORECASE,
)


def _sentence(message: str) -> str:
    """The server's words without Triton's request-id prefix and without line breaks."""
    return " ".join(_PREFIX.sub("", message).split())


def from_status(code: str, details: str | None, url: str) -> MorphError:
    """The error for a gRPC status; ``code`` is its name, such as ``UNAVAILABLE``; ``url`` is the server's address."""
    message = _sentence(details or "")
    if code == "INVALID_ARGUMENT":
        return InvalidRequest(message or "the server refused the request without saying why")
    if code == "CANCELLED":
        return Cancelled(message or "the request was cancelled")
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(f"the request was not finished by its deadline ({url})")
    if code == "RESOURCE_EXHAUSTED":
        return InvalidRequest(message or "the request is too large for the server")
    if code == "UNAVAILABLE":
        if _NOT_CONNECTED.search(message):
            return ServerUnavailable(
                f"no gRPC server answers at {url}: start one with 'morph serve', "
                "or give the address of a running one (Triton's gRPC port, by default 8001)"
            )
        if not message or "socket closed" in message.lower() or "connection reset" in message.lower():
            return ServerUnavailable(f"the connection to {url} was lost before the request was finished")
        return _known(message) or ServerUnavailable(message)
    if code == "UNIMPLEMENTED":
        return ServerError(f"what answers at {url} is not a Triton gRPC endpoint: its default port is 8001")
    return _known(message) or ServerError(message or "the server reported an error without saying which")


def from_message(message: str) -> MorphError:
    """The error for words that came without a status, as Triton sends errors inside a stream.

    It would send a status in their place to clients with the header ``triton_grpc_error``, but Triton 2.51 crashes
    now and then as it does (bench/reliability/README.md). What matches nothing known is a bad request: of those
    there are as many wordings as limits.
    """
    text = _sentence(message)
    if _FIELD.match(text):  # what the rest says may be the caller's own words
        return InvalidRequest(text)
    return _known(text) or InvalidRequest(text or "the server reported an error without saying which")


def _known(text: str) -> MorphError | None:
    """The error for a sentence of Triton's or of the model's that is about more than a bad request."""
    for pattern, kind in _KINDS:
        if pattern.search(text):
            return kind(text)
    return None
