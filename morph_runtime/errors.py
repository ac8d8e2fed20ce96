"""The errors of the runtime, sorted by who can mend them."""

from __future__ import annotations


class MorphError(Exception):
    """Base of every error that the runtime raises on purpose. Its text is one sentence for a person."""


class ConfigError(MorphError):
    """A setting, a model folder or the machine is not fit to start; the text names the field and the remedy."""


class RequestError(MorphError):
    """A request is not valid.

    Attributes:
        field: the request's field that is at fault.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class EngineDown(MorphError):
    """The engine process has ended or cannot be reached; the text says why."""


class IntegrityError(MorphError):
    """An internal invariant does not hold (pages, blocks, tables). Always a defect of ours, never of a request."""
