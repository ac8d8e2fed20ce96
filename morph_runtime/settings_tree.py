"""Trees of dataclasses from plain values, with errors that name the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from morph_runtime.errors import ConfigError

BOOLEANS: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}


def kind_name(kind: Any) -> str:
    """A field's type in words."""
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(kind, "a comma-separated list")


def parse(kind: Any, text: str) -> Any:
    """The value that an environment variable spells; raises ValueError."""
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(text)
        return BOOLEANS[text.lower()]
    return kind(text) if kind in (int, float, str) else tuple(filter(None, text.split(",")))


def build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """The dataclass `cls` with these values for its fields; `prefix` (empty, or ending in a dot) leads to it.

    Raises:
        ConfigError: an unknown key or a wrong type; the text names the field.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'The configuration'} must be an object with named fields.")
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"Unknown setting '{prefix}{key}'; known are: {', '.join(sorted(known))}.")
        arguments[key] = _convert(hints[key], value, prefix + key)
    return cls(**arguments)


def _convert(kind: Any, value: Any, name: str) -> Any:
    if is_dataclass(kind):
        return build(kind, value, name + ".")
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # JSON's whole numbers have no limit
            return math.inf if value > 0 else -math.inf
    if kind in (int, str, bool) and type(value) is kind:
        return value
    if kind == tuple[str, ...] and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise ConfigError(f"{name} must be {kind_name(kind)}, but is {value!r}.")


def as_plain(node: Any) -> Any:
    """The tree as dictionaries and lists; `build` gives it back."""
    if is_dataclass(node):
        return {f.name: as_plain(getattr(node, f.name)) for f in fields(node)}
    return list(node) if isinstance(node, tuple) else node
