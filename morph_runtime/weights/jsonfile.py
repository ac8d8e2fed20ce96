"""Typed reading of a checkpoint's JSON files; every fault is a ConfigError that names file and field."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morph_runtime.errors import ConfigError

MAX_JSON_BYTES = 64 * 2**20
"""No config or index of a real checkpoint comes near; larger files are refused before they are read."""


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `max_bytes`.

    Raises:
        ConfigError: the file cannot be read, is too large, or does not hold an object.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise ConfigError(f"{path} is larger than {max_bytes >> 20} MiB: it cannot be what its name says.")
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    return values


class Fields:
    """The fields of one JSON object, checked as they are taken."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """`where` names the file (and the object in it) in errors."""
        self._values = values
        self._where = where

    def has(self, name: str) -> bool:
        """Whether it is there, be it null."""
        return name in self._values

    def get(self, name: str) -> Any:
        """The raw value, or None where it is absent or null."""
        return self._values.get(name)

    def whole(self, name: str, default: int | None = None, low: int = 1, high: int = 2**31) -> int:
        """A whole number in [low, high]; without `default` it must be there.

        Raises:
            ConfigError: absent, no whole number, or out of range.
        """
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{self._where}: '{name}' must be a whole number from {low} to {high}, but is {value!r}.")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0.0) -> float:
        """A finite number above `low`; without `default` it must be there.

        Raises:
            ConfigError: absent, no number, or out of range.
        """
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        # By comparison: a whole number of JSON may have more digits than a float can hold, and NaN compares as False.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low < value <= sys.float_info.max:
            return float(value)
        raise ConfigError(f"{self._where}: '{name}' must be a number above {low:g}, but is {value!r}.")

    def flag(self, name: str, default: bool) -> bool:
        """True or false.

        Raises:
            ConfigError: anything else.
        """
        value = self._values.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise ConfigError(f"{self._where}: '{name}' must be true or false, but is {value!r}.")
        return value

    def section(self, name: str) -> Mapping[str, Any] | None:
        """A nested object, or None where it is absent or null.

        Raises:
            ConfigError: it is no object.
        """
        value = self._values.get(name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{self._where}: '{name}' must be an object, but is {value!r}.")
        return value
