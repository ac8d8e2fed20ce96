"""What can go wrong, in OpenAI's words: an HTTP status and an error object."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from morph_client.chat import context_named_in
from morph_client.errors import (
    BadInput,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    MorphError,
    QueueFull,
    QueueTimeout,
    ServerUnavailable,
)

RETRY_AFTER_S = 1
"""Seconds after which a client may ask again. A burst is over in seconds; clients back off by themselves beyond."""

_FIELD = re.compile(r"^([a-z_][a-z_0-9.]*): ")
# The server names its inputs; clients of this interface know other names for two of them.
_PROMPT_FIELDS = {"text_input"}


@dataclass
class ApiError(Exception):
    """An answer that is an error."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def text(self) -> str:
        """The same as JSON."""
        return json.dumps(self.body(), ensure_ascii=False)


def from_server(error: MorphError, prompt_field: str) -> ApiError:
    """The answer for what the server, or the way to it, has refused. ``prompt_field`` is `messages` or `prompt`."""
    message = str(error)
    again = {"Retry-After": str(RETRY_AFTER_S)}
    if isinstance(error, InvalidRequest):
        named = _FIELD.match(message)
        param = named[1] if named else None
        if param in _PROMPT_FIELDS:
            param, message = prompt_field, f"{prompt_field}: {message[len(named[0]) :]}" if named else message
        code = None if context_named_in(error) is None else "context_length_exceeded"
        return ApiError(400, message, param=param, code=code)
    if isinstance(error, BadInput):
        return ApiError(400, message, param=prompt_field)
    if isinstance(error, QueueFull):
        return ApiError(429, message, "rate_limit_error", code="queue_full", headers=again)
    if isinstance(error, QueueTimeout):
        return ApiError(503, message, "server_error", code="queue_timeout", headers=again)
    if isinstance(error, (ServerUnavailable, Cancelled)):
        return ApiError(503, message, "server_error", code="unavailable", headers=again)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, message, "server_error", code="deadline_exceeded")
    return ApiError(500, message, "server_error")


def from_shape(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The answer for a body that is no JSON or has not the right types.

    Of several complaints the first counts. Where a value may be of two types, each complains: the one that got
    deepest into the value knows best.
    """
    first = max((e for e in errors if e["loc"][:2] == errors[0]["loc"][:2]), key=lambda e: len(e["loc"]))
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, "The body is not valid JSON.")
    place = [str(step) for step in first["loc"] if step != "body"]
    if not place:
        return ApiError(400, "The body must be a JSON object, sent with 'Content-Type: application/json'.")
    # The location also names the types that a value may have ("stop", "list[str]", 0): they are not in the request.
    name = ".".join(step for step in place if (step.isidentifier() and step != "str") or step.isdigit())
    if kind == "extra_forbidden":
        return ApiError(400, f"{name}: unknown parameter.", param=name)
    if kind == "missing":
        return ApiError(400, f"{name}: the parameter is required.", param=name)
    words = str(first["msg"])
    return ApiError(400, f"{name}: {words[0].lower()}{words[1:]}.", param=name)


def no_such_model(asked: str, served: str) -> ApiError:
    """The answer for a model that is not served."""
    message = f"The model '{asked}' does not exist: this server has '{served}'."
    return ApiError(404, message, param="model", code="model_not_found")
